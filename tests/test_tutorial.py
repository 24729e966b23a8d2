"""The Python blocks of tutorial.md run, a chapter being one program, and print what the text blocks below them say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "tutorial.md").read_text(encoding="utf-8")
PARTS = re.split(r"^# (?=Introduction|Chapter |Exercises|Appendix)", TUTORIAL, flags=re.MULTILINE)[1:]
PARTS[:2] = [PARTS[1].replace("\n", f"\n{PARTS[0]}", 1)]  # the introduction and chapter 1 are one program
CHAPTERS = {part.splitlines()[0]: part for part in PARTS}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks(chapter: str) -> list[tuple[str, str]]:
    """(code, what it prints) of each Python block."""
    return BLOCK.findall(chapter)


def run(chapter: str) -> list[tuple[str, str]]:
    """(printed, expected) of each block, all run in one namespace."""
    names, results = {"__name__": "tutorial"}, []
    for code, expected in blocks(chapter):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "tutorial.md", "exec"), names)  # noqa: S102 (the page is our own)
        results.append((printed.getvalue(), expected))
    return results


@pytest.mark.filterwarnings("ignore")  # TRL's: rollout_func is experimental, and what transformers deprecates
@pytest.mark.parametrize("title", CHAPTERS)
def test_blocks_print_what_the_page_says(title):
    if "from trl import" in CHAPTERS[title]:
        pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    for printed, expected in run(CHAPTERS[title]):
        assert printed == expected


def test_every_block_is_found():
    assert CHAPTERS
    assert TUTORIAL.count("```python") == sum(len(blocks(chapter)) for chapter in CHAPTERS.values()) > 0


def test_every_output_is_compared():
    """A text block that is not directly below its Python block would not be compared: only pictures may be so."""
    outputs = re.findall(r"^```text\n(.*?)^```\n", TUTORIAL, re.MULTILINE | re.DOTALL)
    compared = [expected for chapter in CHAPTERS.values() for _, expected in blocks(chapter) if expected]
    assert all("(0)" in text or "lane " in text for text in outputs if text not in compared)


def test_index_names_what_exists():
    """The table of 0.3: the functions are in the paper's script, and the files of tests are there."""
    scripts = {
        "Tree-GRPO": "tree_grpo",
        "TreeRL": "treerl",
        "GraphGPO": "graph_gpo",
        "all": "tree_grpo",
    }
    table = TUTORIAL.partition("| paper | equation or section |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\|([^|]*)\|[^|]*\|([^|]*)\|([^|]*)\|$", table, re.MULTILINE)[1:]
    assert len(rows) > 10
    missing, script = [], ""
    for paper, functions, files in rows:
        if paper.strip():
            script = (ROOT / f"{scripts[paper.strip()]}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", functions):
            if not re.search(rf"^(def|class) {name}\b", script, re.MULTILINE):
                missing.append(name)
        missing += [name for name in re.findall(r"`(\w+\.py)`", files) if not (ROOT / "tests" / name).exists()]
    assert missing == []


def test_tests_that_are_named_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TUTORIAL)
    assert named
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_a_wrong_number_is_noticed():
    [(printed, expected)] = run("```python\nprint(1 + 1)\n```\n```text\n3\n```\n")
    assert (printed, expected) == ("2\n", "3\n")


@pytest.mark.filterwarnings("ignore")
def test_verl_calls_the_estimators(monkeypatch):
    """verl's own compute_advantage, with the estimators of 5.2 in its registry, gives what calling them does."""
    trainer = pytest.importorskip(
        "verl.trainer.ppo.ray_trainer",
        reason="verl is not installed (5.2 was tried with verl 0.9.1)",
    )
    from verl import DataProto
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos

    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", {})  # a second registration of a name is refused
    names = {"__name__": "tutorial"}
    for code, _ in blocks(TUTORIAL[TUTORIAL.index("\n## 5.2 ") : TUTORIAL.index("\n# Exercises")]):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "tutorial.md", "exec"), names)  # noqa: S102 (the page is our own)
    assert set(core_algos.ADV_ESTIMATOR_REGISTRY) == {"tree_grpo", "treerl", "graph_gpo"} == set(names["uids"])
    tensors = {"token_level_rewards": names["rewards"], "response_mask": names["mask"]}
    for name, uid in names["uids"].items():
        batch = DataProto.from_dict(tensors=dict(tensors), non_tensors={"uid": uid})
        batch = trainer.compute_advantage(batch, adv_estimator=name, config=AlgoConfig(adv_estimator=name))
        expected, _ = names[f"{name}_estimator"](*tensors.values(), index=uid)
        assert expected.abs().sum() > 0
        assert batch.batch["advantages"].equal(expected) and batch.batch["returns"].equal(expected)
