"""Data files of tree_grpo.py and treerl.py: what is read of them, and what is refused."""

import json
import sys
from fractions import Fraction

import pytest
from test_tasks import needs_math_verify, pairs

import tree_grpo
import treerl
from tree_grpo import read_questions
from treerl import number, read_problems

READ = {tree_grpo: read_questions, treerl: read_problems}


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def hotpot(question="Who wrote A?", answer="Ann", context=None, **more):
    """A record in HotpotQA's published shape: sentences after the first begin with a space."""
    context = context or [["A", ["A is a book.", " Ann wrote it."]], ["B", ["B is a town."]]]
    record = {"_id": "5a7a06935542990198eaf050", "answer": answer, "question": question}
    record |= {"type": "bridge", "level": "medium", "supporting_facts": [["A", 1]]}
    return record | {"context": context, **more}


def musique(question="Who wrote A?", answer="Ann", aliases=("Ann Smith", "A. Smith"), **more):
    """A record in MuSiQue's published shape."""
    paragraphs = []
    for i, (title, text) in enumerate(more.pop("texts", {"A": "A is a book."}).items()):
        paragraph = {"idx": i, "title": title, "paragraph_text": text, "is_supporting": i == 0}
        paragraphs.append(paragraph)
    record = {"id": "2hop__13548_13529", "paragraphs": paragraphs, "question": question}
    record |= {"question_decomposition": [], "answer": answer, "answer_aliases": list(aliases)}
    return record | {"answerable": True, **more}


def gsm8k(
    question="Ann has 40 books and buys 2. How many has she?",
    answer="40 + 2 = <<40+2=42>>42\n#### 42",
):
    """A record in GSM8K's published shape."""
    return {"question": question, "answer": answer}


def math500(problem="Compute $\\frac{1}{4} + \\frac{1}{4}$.", answer="\\frac{1}{2}"):
    """A record in the shape in which the hub has MATH-500."""
    solution = "Both are $\\frac{1}{4}$, so it is $\\boxed{\\frac{2}{4}}$."
    record = {"problem": problem, "solution": solution, "answer": answer}
    return record | {"subject": "Prealgebra", "level": 2, "unique_id": "test/prealgebra/1.json"}


def math_record(problem="What is $|\\{1, 2\\}|$?", solution="There are two: $\\boxed{2}$."):
    """A record in MATH's published shape, whose answer is in the solution only."""
    return {"problem": problem, "level": "Level 1", "type": "Prealgebra", "solution": solution}


CAPITAL = {"Question": "Where?", "Answer": "5"}


@pytest.fixture(params=["lines", "list", "list over lines"])
def written(request, tmp_path):
    """written(records) -> the path of a file of them, in each of the ways to write it."""

    def write(records):
        path = tmp_path / "data"
        if request.param == "lines":
            path.write_text(lines(records))
        else:
            path.write_text(json.dumps(records, indent=1 if "over" in request.param else None))
        return str(path)

    return write


def test_hotpotqa_and_2wikimultihopqa(written):
    # 2Wiki has HotpotQA's shape with some fields more, one of them a list of triples, and sentences
    # without spaces before them.
    other = [["C", ["C is a river."]], ["A", ["A is a book.", "Ann wrote it."]]]
    wiki = hotpot("What is C?", "a river", other, evidences=[["A", "author", "Ann"]])
    first, second = read_questions(written([hotpot(), wiki]))
    assert (first.text, first.answers) == ("Who wrote A?", ["Ann"])
    assert (second.text, second.answers) == ("What is C?", ["a river"])
    # A search looks into the passages of all questions; one that two of them share is there once.
    assert first.passages is second.passages
    book = ("A", "A is a book. Ann wrote it.")
    assert first.passages.passages == [book, ("B", "B is a town."), ("C", "C is a river.")]


def test_musique_keeps_aliases_and_leaves_out_the_unanswerable(written):
    unanswerable = musique("Who wrote C?", answerable=False, texts={"B": "B is a town."})
    last = musique("Who?", "Bo", [], texts={"D": "Bo."})
    first, second = read_questions(written([musique(), unanswerable, last]))
    assert (first.text, first.answers) == ("Who wrote A?", ["Ann", "Ann Smith", "A. Smith"])
    assert (second.text, second.answers) == ("Who?", ["Bo"])
    passages = [("A", "A is a book."), ("B", "B is a town."), ("D", "Bo.")]
    assert second.passages.passages == passages


def test_gsm8k(written):
    answers = ["40 + 2 = 42\n#### 42", "#### 1,234", "It falls.\n#### -5", "#### 1\n#### 2\n"]
    answers.append("####  $0.50 ")
    records = [gsm8k(f"How many, {i}?", answer) for i, answer in enumerate(answers)]
    problems = read_problems(written(records))
    assert [problem.text for problem in problems] == [f"How many, {i}?" for i in range(5)]
    assert [number(problem.answer) for problem in problems] == [42, 1234, -5, 2, Fraction(1, 2)]
    assert not any(problem.latex for problem in problems)


@needs_math_verify
def test_math_and_gsm8k_in_one_file(written):
    capital = {"Question": "Where?", "Answer": "\\boxed{(3,\\pi/2)}"}
    empty = math_record(solution="It is $\\boxed{}$.")  # the published training set has such
    records = [math500("Who?", "\\text{Evelyn}"), empty, math500(), gsm8k(), CAPITAL, capital]
    # The last two are rare in MATH, but in it, and one must not make the whole file useless.
    solutions = pairs(r"""
    So it is $\boxed{2}$. ~ 2 ; First $\boxed{1}$, at last \[\boxed{ 2 }\] ~ 2
    So it is $\boxed{\frac{\sqrt{3}}{2^{n}}}$ or so. ~ \frac{\sqrt{3}}{2^{n}}
    The set is $\boxed{\{1,2\}}$. ~ \{1,2\} ; It is $\boxed{\text{even}}.$ ~ \text{even}
    So it is $\boxed 2$. ~ 2 ; It is $\fbox{2}$. ~ 2
    """)
    records += [math_record(solution=text) for text, _ in solutions]
    problems = read_problems(written(records))
    # MATH-500's answers are in a field of their own, which counts, whatever the solution says.
    answers = ["\\text{Evelyn}", "\\frac{1}{2}", "42", "5", "(3,\\pi/2)"]
    assert [problem.answer for problem in problems] == answers + [a for _, a in solutions]
    assert [problem.latex for problem in problems] == [True, True, False, *[True] * 9]
    assert [problem.text for problem in problems[:5:4]] == ["Who?", "Where?"]


def test_byte_order_mark_and_other_line_ends(tmp_path):
    path = tmp_path / "data"
    for script, record in ((tree_grpo, hotpot), (treerl, gsm8k)):
        texts = [json.dumps(record(text), ensure_ascii=False) for text in ("Où?", "Who?")]
        for text in (f"[{texts[0]},{texts[1]}]", f"{texts[0]}\n{texts[1]}"):
            text = ("\n\n" + text + "\n \n").replace("\n", "\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
            assert [item.text for item in READ[script](str(path))] == ["Où?", "Who?"]


def test_half_a_surrogate_pair_does_not_get_to_the_tokenizer():
    # JSON can spell half of a pair, \ud83d, which is no character: a tokenizer raises TypeError on
    # a text that has it.
    def tokenizer(text, add_special_tokens):
        return {"input_ids": list(text.encode())}

    tokens = tree_grpo.encode(tokenizer, json.loads('"half \\ud83d of one"'))
    assert bytes(tokens).decode() == "half ? of one"


# ---------------------------------------------------------------------- data files that are refused
def refusal(script, path, content=None) -> str:
    """The message with which a script turns a data file down: a line that names flag and file."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(script.BadInput) as caught:
        READ[script](str(path))
    message = str(caught.value)
    assert message.startswith(f"--data {path}: ")
    assert "\n" not in message
    return message.removeprefix(f"--data {path}: ")


@pytest.mark.parametrize(
    ("script", "record"),
    [(tree_grpo, hotpot()), (tree_grpo, musique()), (treerl, gsm8k()), (treerl, math_record())],
)
def test_a_file_that_is_cut_anywhere(tmp_path, script, record):
    # A download that broke off may end inside a word, after a bracket, or between two records.
    path = tmp_path / "cut"
    whole = json.dumps([record, record])
    for end in range(1, len(whole)):
        assert "JSONDecodeError" in refusal(script, path, whole[:end])
    good = lines([record] * 2)
    last = json.dumps(record)
    for end in range(1, len(last)):
        assert refusal(script, path, good + last[:end]).startswith("record 3: ")
    broken = good + last[:40] + "\n" + last  # in the middle
    assert refusal(script, path, broken).startswith("record 3: ")


# fmt: off
WITHOUT = [
    (tree_grpo, hotpot(), ["question", "answer", "context"]),
    (tree_grpo, musique(), ["question", "answer", "paragraphs"]),
    (treerl, gsm8k(), ["question", "answer"]), (treerl, math_record(), ["problem", "solution"]),
    (treerl, math500(), ["problem"]), (treerl, CAPITAL, ["Question", "Answer"]),
]
USELESS = [  # the last has HotpotQA's shape, with a number for an answer, but not as GSM8K has it
    gsm8k(None), gsm8k(7), gsm8k(["How many?"]), gsm8k(answer=None), gsm8k(answer=42),
    gsm8k(answer=["#### 42"]), gsm8k(answer=""), gsm8k(answer="It is 42."), gsm8k(answer="#### "),
    gsm8k(answer="#### many"), gsm8k(answer="#### 3 or 4"), gsm8k(answer="#### 1/0"),
    gsm8k(answer="42\n####\n42"), math500(None), math500(7), math500(answer=5),
    math500(answer=["5"]), math_record(solution=None), math_record(solution="It is 2."),
    math_record(solution="\\boxed{2"), math_record(solution="#### 2"), None, 7, "question",
    ["question", "answer"], [], hotpot("How many books has Ann?", "42"),
]
NO_QUESTIONS = [
    gsm8k(), hotpot(answer=None), hotpot(7), musique(texts={}), hotpot(context="A B"),
    {**musique(), "paragraphs": [{"title": "A"}]}, hotpot(context=[["A", [1, 2]]]), None, 7,
    "question", ["question", "answer"], {"messages": [{"role": "user", "content": "2 + 2?"}]},
]
NO_JSON = [
    "Who wrote A?\nAnn.\n", "question,answer\nWho,Ann\n", "[" * 100_000, "[" + "9" * 10_000 + "]",
    "\0" * 1000,  # what a crashed download may leave: valid UTF-8, but nothing else
    '{"version": "1.1", "data": []}', "7", '"question"',
]
# fmt: on


def test_records_of_no_use(tmp_path):
    path = tmp_path / "data"
    broken = []
    for script, record, names in WITHOUT:
        for name in names:
            rest = {key: value for key, value in record.items() if key != name}
            broken.append((script, record, rest))
    broken += [(treerl, gsm8k(), record) for record in USELESS]
    broken += [(tree_grpo, hotpot(), record) for record in NO_QUESTIONS]
    for script, good, record in broken:
        for content in (lines([good, record, good]), json.dumps([good, record, good], indent=1)):
            message = refusal(script, path, content)
            assert message.startswith("record 2: want JSON of "), record
            assert ("GSM8K" in message) == (script is treerl)
            assert ("HotpotQA" in message) == (script is tree_grpo)


@pytest.mark.parametrize("script", READ, ids=lambda script: script.__name__)
def test_files_of_no_use(tmp_path, script):
    path = tmp_path / "data"
    for content in NO_JSON:
        assert "want JSON of " in refusal(script, path, content)
    for content in (b"", b"\n \n", b"[]", b"[\n]\n", b"\xef\xbb\xbf"):
        assert "want two records" in refusal(script, path, content)
    few = {tree_grpo: [musique(), musique(answerable=False)], treerl: [gsm8k()]}[script]
    assert "want two records" in refusal(script, path, lines(few))
    assert "UnicodeDecodeError" in refusal(script, path, b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    assert "No such file" in refusal(script, tmp_path / "missing.json")
    assert "directory" in refusal(script, tmp_path)


@pytest.mark.parametrize("record", [math500(), math_record(), CAPITAL])
def test_a_file_that_needs_a_package_that_is_missing(tmp_path, monkeypatch, record):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # it is not there
    path = tmp_path / "math.jsonl"
    assert "pip install math-verify" in refusal(treerl, path, lines([record] * 3))
    path.write_text(lines([gsm8k()] * 3))
    assert len(read_problems(str(path))) == 3  # such answers are compared without it


def test_line_separators_inside_of_texts(tmp_path):
    # JSON allows them, raw, in a text; a line ends with a newline only.
    text = "One\u2028two\u0085three"
    path = tmp_path / "data.jsonl"
    records = [gsm8k(question=text), gsm8k()]
    rows = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(rows, encoding="utf-8", newline="")
    assert read_problems(str(path))[0].text == text
