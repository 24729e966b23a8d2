"""README's table of parts to copy: with what it names, the imports of the script's head, and nothing else, each loads
and has all that it uses; and it uses what it is said to take along."""

import ast
import builtins
import dis
import importlib.util
import re
import sys
import types

import pytest
from outside import README
from test_shared_text import SCRIPTS, definitions

OWN = {"play", "answer_at"}  # the reader's
TABLE = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|[^|]*\|([^|]*)\|$", README, re.MULTILINE)
ROWS = {
    tuple(re.findall(r"`(\w+)`", parts)): set(re.findall(r"`(\w+)`", along)) - OWN
    for parts, along in TABLE
}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS}


def copied(source: str, names: set[str]) -> str:
    """The imports of the head and the definitions of `names`, in the file's order."""
    imports = [
        ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    return "\n\n".join(
        [*imports, *(text for name, text in definitions(source).items() if name in names)]
    )


def names_used(code: types.CodeType) -> set[str]:
    """Global names in a piece of code and in all functions and classes within it."""
    found = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return found.union(
        *(names_used(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))
    )


def test_the_table_is_read():
    assert {"tree_advantages", "step_rewards", "graph_advantages", "sample", "packed_logps"} <= {
        row[0] for row in ROWS
    }


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (parts, name)
        for parts in ROWS
        for name, source in SOURCES.items()
        if parts[0] in definitions(source)
    ],
)
def test_a_part_needs_what_the_table_names_and_nothing_else(parts, name, tmp_path, monkeypatch):
    text = copied(SOURCES[name], {*parts, *ROWS[parts]})
    (tmp_path / "copied.py").write_text(text, encoding="utf-8")
    described = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    module = importlib.util.module_from_spec(described)
    monkeypatch.setitem(sys.modules, "copied", module)
    described.loader.exec_module(module)
    used = {
        name for name in names_used(compile(text, "copied.py", "exec")) if not name.startswith("__")
    }
    assert used <= vars(module).keys() | vars(builtins).keys()
    assert not used & {"tqdm", "transformers"}  # no package but torch
    # What is only for the caller: the attention to register, the trees that play() makes, how they
    # are handed to packed_logps, and what transitions are made of.
    callers = {"token_tree", "Node", "Group", "Packed", "Transition", "SUCCESS"}
    assert ROWS[parts] - used <= callers
