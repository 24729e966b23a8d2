"""The three scripts share code by holding the same text. A function, class or constant that two of them define under
one name has the same text in both, decorators included; `main` and `Args` are each script's own."""

import ast
import itertools
from pathlib import Path

import pytest

NAMES = ("tree_grpo.py", "treerl.py", "graph_gpo.py")
SCRIPTS = [path for name in NAMES if (path := Path(__file__).parents[1] / name).exists()]
OWN = {"main", "Args"}


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
    return {name: text for name, text in found.items() if name not in OWN}


def differing(one: str, other: str) -> list[str]:
    one, other = definitions(one), definitions(other)
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def test_scripts_agree():
    for one, other in itertools.combinations(SCRIPTS, 2):
        names = differing(one.read_text(), other.read_text())
        assert not names, f"{one.name} and {other.name} define differently: {', '.join(names)}"


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("ratio.clamp(1 - clip_low", "ratio.clamp(1 + clip_low", "grpo_loss"),  # a function's body
        ("@torch.inference_mode()\ndef sample(", "def sample(", "sample"),  # a decorator
        ("@dataclass(eq=False)\nclass Node", "@dataclass\nclass Node", "Node"),  # a class's decorator
        ("of the rewards'", "of any", "tree_advantages"),  # a docstring
        ('CITIES = (', 'CITIES = ("York", ', "CITIES"),  # a constant
    ],
)
def test_guard_bites_on_a_changed_copy(old, new, name):
    source = SCRIPTS[0].read_text()
    assert source.count(old) == 1, "the test's own search text has rotted"
    assert differing(source, source.replace(old, new)) == [name]


def test_guard_lets_main_and_arguments_differ():
    source = SCRIPTS[0].read_text()
    changed = source.replace("def main(argv:", "def main(arguments:").replace("M: int =", "G: int =")
    assert changed != source
    assert differing(source, changed) == []
