"""The three scripts share code by holding the same text. A function, class or constant that two of
them define under one name has the same text in both, decorators included, but for what is each
script's own."""

import ast
import itertools
from pathlib import Path

import pytest

NAMES = ("tree_grpo.py", "treerl.py", "graph_gpo.py")
SCRIPTS = [Path(__file__).parents[1] / name for name in NAMES]
OWN = {"main", "Args", "train", "credit"}


def definitions(source: str) -> dict[str, str]:
    """Name -> text of each top-level function, class and constant."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in (part.id for part in ast.walk(target) if isinstance(part, ast.Name)):
                    found[name] = ast.get_source_segment(source, node)
    return found


def differing(one: str, other: str) -> list[str]:
    one, other = definitions(one), definitions(other)
    same = one.keys() & other.keys() - OWN
    return sorted(name for name in same if one[name] != other[name])


def test_scripts_agree():
    for one, other in itertools.combinations(SCRIPTS, 2):
        names = differing(one.read_text("utf-8"), other.read_text("utf-8"))
        assert not names, f"{one.name} and {other.name} define differently: {', '.join(names)}"


def test_what_is_each_scripts_own_differs():
    # A name stays in OWN only as long as its texts differ.
    found = [definitions(path.read_text("utf-8")) for path in SCRIPTS]
    for name in OWN:
        assert len({texts[name] for texts in found}) == 3


def engine(source: str) -> list[str]:
    """The lines from the one that is nothing but = to the first section after it that is not the
    engine's."""
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# ====="))
    rest = itertools.takewhile(
        lambda line: not line.startswith("# ------") or " engine: " in line, lines[first:]
    )
    return list(rest)


def test_the_engine_is_the_same_text():  # comments and blank lines included
    texts = [engine(path.read_text("utf-8")) for path in SCRIPTS]
    assert len(texts[0]) > 500 and texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("ratio.clamp(1 - clip_low", "ratio.clamp(1 + clip_low", "grpo_loss"),  # a body
        ("@torch.inference_mode()\ndef sample(", "def sample(", "sample"),  # a decorator
        ("@dataclass(eq=False)\nclass Node", "@dataclass\nclass Node", "Node"),  # a class's
        ("of the rewards'", "of any", "tree_advantages"),  # a docstring
        ("MOST_SCORES = 2**26", "MOST_SCORES = 2**25", "MOST_SCORES"),  # a constant
    ],
)
def test_guard_bites_on_a_changed_copy(old, new, name):
    source = SCRIPTS[0].read_text("utf-8")
    assert source.count(old) == 1, "the test's own search text has rotted"
    assert differing(source, source.replace(old, new)) == [name]
