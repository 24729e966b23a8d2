"""What is said of somebody's released code names repository, commit and file, where it is said or where it refers to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "tutorial.md", *sorted((ROOT / "benchmarks").glob("**/*.md"))]
CODE = [
    path for folder in ("", "benchmarks", "envs") for path in sorted((ROOT / folder).glob("*.py"))
]
CLAIM = re.compile(
    r"[Rr]eleased? (code|script|function|GraphGPO|GiGPO)|[Tt]he release\b"
    r"|(authors'|[Ii]ts|[Tt]heir|paper's) (own )?(code|scripts?|functions?|implementation)\b"
)
SOURCE = re.compile(r"commit [0-9a-f]{7}\b")
REFERENCE = re.compile(r"[(\[](\d\.\d)\b|tutorial,\s+(\d\.\d)\b|, (\d\.\d)\)")


def sections(path: Path) -> dict[str, str]:
    """Heading -> text of each section of a page, what is before the first heading included."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    found = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {"": found[0], **dict(zip(found[1::2], found[2::2]))}


SOURCED = {  # numbers of the tutorial's sections that name a commit and a file
    heading.split()[0]
    for heading, text in sections(ROOT / "tutorial.md").items()
    if SOURCE.search(text) and re.search(r"`[\w./*]+\.(py|sh|yaml)`", text)
}


def unsourced(text: str) -> bool:
    """Does it speak of released code without a commit, and without reference to a section that has one?"""
    references = {number for found in REFERENCE.findall(text) for number in found}
    return bool(CLAIM.search(text)) and not SOURCE.search(text) and not SOURCED & references


def test_sections_with_sources_are_known():
    assert {"1.4", "2.5", "3.7"} <= SOURCED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_of_released_code_has_a_source(page):
    assert [heading for heading, text in sections(page).items() if unsourced(text)] == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_what_a_script_says_of_released_code_has_a_source(path):
    text = path.read_text(encoding="utf-8")
    said = [
        text[found.start() : found.end() + 200]
        for found in re.finditer("authors' code|released code", text)
    ]
    assert [words for words in said if unsourced(words)] == []


@pytest.mark.parametrize(
    "text",
    [
        "The released code sums twice.",
        "As the authors' code does (see 9.9).",
        "Its code has ω = 0.2 and takes 3.7 seconds.",
        "The release at 1.4 times the cost.",
    ],
)
def test_a_claim_without_source_is_noticed(text):
    assert unsourced(text)


@pytest.mark.parametrize(
    "text",
    [
        "The released code (repository, commit 0123abc) sums twice.",
        "Nothing of the kind.",
        "The released code adds both terms (1.4).",
        "As in their scripts ([tutorial, 3.7](x)).",
    ],
)
def test_a_claim_with_a_source_is_not(text):
    assert not unsourced(text)
