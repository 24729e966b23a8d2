"""Data files of tree_grpo.py and treerl.py: what is read of them, and what is refused."""

import json
import sys
from fractions import Fraction

import pytest
from problems import Problems, number
from questions import Questions
from records import split_data
from test_problems import needs_math_verify, pairs

import tree_grpo
import treerl

TASK = {tree_grpo: Questions, treerl: Problems}


def read(script, path, **how) -> dict:
    """The items of a data file, by their texts."""
    task = TASK[script](script.Args(data=str(path), **how))
    return {item.text: item for item in task.training + task.held_out}


def answers(path, **how) -> dict:
    """What treerl.py reads: the text of a problem -> its answer, and if this is LaTeX."""
    return {text: (item.answer, item.latex) for text, item in read(treerl, path, **how).items()}


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


CAPITAL = {"Question": "How many?", "Answer": "5"}


@pytest.fixture(params=["lines", "list", "list over lines", "parquet"])
def written(request, tmp_path):
    """written(records) -> the path of a file of them, in each of the ways to write it."""

    def write(records):
        path = tmp_path / "data"
        if request.param == "parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            path = path.with_suffix(".parquet")
            # A column that only some records have is null in the others.
            names = {name: None for record in records for name in hub(record)}
            rows = [names | hub(record) for record in records]
            parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)
        elif request.param == "lines":
            path.write_text(lines(records))
        else:
            path.write_text(json.dumps(records, indent=1 if "over" in request.param else None))
        return path

    return write


def hub(record: dict) -> dict:
    """A record in the hub's shape, which Parquet can hold: HotpotQA's lists by columns."""
    record = {name: value for name, value in record.items() if name != "supporting_facts"}
    if "context" in record:
        titles, sentences = zip(*record["context"])
        record["context"] = {"title": list(titles), "sentences": list(sentences)}
    return record


# ----------------------------------------------------------------------------------- what is read
def test_hotpotqa_and_2wikimultihopqa(written):
    # 2Wiki has HotpotQA's shape with some fields more, one of them a list of triples, and sentences
    # without spaces before them.
    other = [["C", ["C is a river."]], ["A", ["A is a book.", "Ann wrote it."]]]
    wiki = hotpot("What is C?", "a river", other, evidences=[["A", "author", "Ann"]])
    path = written([hotpot(), wiki])
    found = read(tree_grpo, path)
    assert {text: question.answers for text, question in found.items()} == {
        "Who wrote A?": ["Ann"],
        "What is C?": ["a river"],
    }
    # A search looks into the passages of all questions; one that two of them share is there once.
    task = Questions(tree_grpo.Args(data=str(path)))
    book = ("A", "A is a book. Ann wrote it.")
    assert task.index.passages == [book, ("B", "B is a town."), ("C", "C is a river.")]
    asked = [(found["What is C?"], "Ann"), (found["Who wrote A?"], "mountain")]
    assert task.search(asked) == ["A: A is a book. Ann wrote it.", "nothing found"]


def test_the_hub_has_hotpotqa_by_columns(tmp_path):
    path = tmp_path / "data"
    path.write_text(lines([hub(hotpot()), hub(hotpot("Who?"))]))
    book = ("A", "A is a book. Ann wrote it.")
    index = Questions(tree_grpo.Args(data=str(path))).index
    assert index.passages == [book, ("B", "B is a town.")]


def test_musique_keeps_aliases_and_leaves_out_the_unanswerable(written, capsys):
    unanswerable = musique("Who wrote C?", answerable=False, texts={"B": "B is a town."})
    last = musique("Who?", "Bo", [], texts={"D": "Bo."})
    path = written([musique(), unanswerable, last])
    found = read(tree_grpo, path)
    assert {text: question.answers for text, question in found.items()} == {
        "Who wrote A?": ["Ann", "Ann Smith", "A. Smith"],
        "Who?": ["Bo"],
    }
    index = Questions(tree_grpo.Args(data=str(path))).index
    assert index.passages == [("A", "A is a book."), ("B", "B is a town."), ("D", "Bo.")]
    assert capsys.readouterr().out == ""


def test_an_answer_to_a_question_may_be_a_number(tmp_path):
    path = tmp_path / "data"
    path.write_text(lines([hotpot("When?", 1903), hotpot("When then?", 1904.0)]))
    found = read(tree_grpo, path)
    assert found["When?"].answers == ["1903"]
    assert found["When then?"].answers == ["1904"]


def test_gsm8k(written):
    said = ["40 + 2 = 42\n#### 42", "#### 1,234", "It falls.\n#### -5", "#### 1\n#### 2\n"]
    said.append("####  $0.50 ")
    records = [gsm8k(f"How many, {i}?", answer) for i, answer in enumerate(said)]
    found = answers(written(records))
    values = [number(found[f"How many, {i}?"][0]) for i in range(5)]
    assert values == [42, 1234, -5, 2, Fraction(1, 2)]
    assert not any(latex for _, latex in found.values())


# fmt: off
SHAPES = [  # of other data sets, as the hub has them: a record, its problem and its answer
    # AIME: HuggingFaceH4/aime_2024, MathArena/aime_2024_I, Maxwell-Jia/AIME_2024,
    # di-zhang-fdu/AIME_1983_2024, opencompass/AIME2025
    ({"id": 60, "problem": "p1", "solution": "\\boxed{204}", "answer": "204", "year": "2024"},
     "p1", "204"),
    ({"problem_idx": 1, "problem": "p2", "answer": 45}, "p2", "45"),
    ({"ID": "2024-I-1", "Problem": "p3", "Solution": "So 33.", "Answer": 33}, "p3", "33"),
    ({"ID": "1983-1", "Year": 1983, "Question": "p4", "Answer": "060"}, "p4", "060"),
    ({"question": "p5", "answer": "70"}, "p5", "70"),
    ({"problem": "p6", "question": "Solve it. p6", "answer": 7}, "p6", "7"),
    ({"problem": None, "Question": "p13", "Answer": 8, "answer": None}, "p13", "8"),
    # AMC: AI-MO/aimo-validation-amc, math-ai/amc23
    ({"id": 0, "problem": "p7", "answer": 142.0, "url": "u"}, "p7", "142"),
    ({"id": 0, "question": "p8", "answer": "27.0", "url": "u"}, "p8", "27.0"),
    # OlympiadBench
    ({"id": 1606, "question": "p9", "solution": ["It is 2."], "final_answer": ["2"],
      "is_multiple_answer": False, "answer_type": "Numerical"}, "p9", "2"),
    ({"question": "p10", "solution": [], "final_answer": ["$\\frac{1}{n+2}$"], "context": None,
      "is_multiple_answer": False, "answer_type": "Expression"}, "p10", "$\\frac{1}{n+2}$"),
    # an answer that is in a box, and one of more digits than a float has
    ({"problem": "p11", "answer": "It is $\\boxed{\\text{even}}$."}, "p11", "\\text{even}"),
    ({"problem": "p12", "answer": 12345678901234567890}, "p12", "12345678901234567890"),
]
# fmt: on


@needs_math_verify
def test_other_shapes_of_problems(tmp_path):
    path = tmp_path / "data"
    for record, text, answer in SHAPES:
        path.write_text(lines([record, gsm8k()]))
        assert answers(path)[text] == (answer, True)


@needs_math_verify
def test_numbers_of_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "amc.parquet"
    rows = [{"problem": "p1", "answer": 142.0}, {"problem": "p2", "answer": 3.0}]
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)
    assert answers(path) == {"p1": ("142", True), "p2": ("3", True)}


@needs_math_verify
def test_math_and_gsm8k_in_one_file(tmp_path):
    capital = {"Question": "Where?", "Answer": "\\boxed{(3,\\pi/2)}"}
    empty = math_record("None", "It is $\\boxed{}$.")  # the published training set has such
    records = [math500("Who?", "\\text{Evelyn}"), empty, math500(), gsm8k("40?"), CAPITAL, capital]
    # The last two are rare in MATH, but in it, and one must not make the whole file useless.
    solutions = pairs(r"""
    So it is $\boxed{2}$. ~ 2 ; First $\boxed{1}$, at last \[\boxed{ 2 }\] ~ 2
    So it is $\boxed{\frac{\sqrt{3}}{2^{n}}}$ or so. ~ \frac{\sqrt{3}}{2^{n}}
    The set is $\boxed{\{1,2\}}$. ~ \{1,2\} ; It is $\boxed{\text{even}}.$ ~ \text{even}
    So it is $\boxed 2$. ~ 2 ; It is $\fbox{2}$. ~ 2
    """)
    for i, (text, _) in enumerate(solutions):
        records.append(math_record(f"Solution {i}?", text))
    path = tmp_path / "data"
    path.write_text(lines(records))
    # MATH-500's answers are in a field of their own, which counts, whatever the solution says.
    expected = {"Who?": ("\\text{Evelyn}", True), math500()["problem"]: ("\\frac{1}{2}", True)}
    expected |= {"40?": ("42", False), "How many?": ("5", True), "Where?": ("(3,\\pi/2)", True)}
    expected |= {f"Solution {i}?": (gold, True) for i, (_, gold) in enumerate(solutions)}
    assert answers(path) == expected


def test_byte_order_mark_and_other_line_ends(tmp_path):
    path = tmp_path / "data"
    for script, record in ((tree_grpo, hotpot), (treerl, gsm8k)):
        texts = [json.dumps(record(text), ensure_ascii=False) for text in ("Où?", "Who?")]
        for text in (f"[{texts[0]},{texts[1]}]", f"{texts[0]}\n{texts[1]}"):
            text = ("\n\n" + text + "\n \n").replace("\n", "\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
            assert set(read(script, path)) == {"Où?", "Who?"}


def test_line_separators_inside_of_texts(tmp_path):
    # JSON allows them, raw, in a text; a line ends with a newline only.
    text = "One\u2028two\u0085three"
    path = tmp_path / "data.jsonl"
    records = [gsm8k(question=text), gsm8k()]
    rows = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(rows, encoding="utf-8", newline="")
    assert text in read(treerl, path)


def test_half_a_surrogate_pair_does_not_get_to_the_tokenizer():
    # JSON can spell half of a pair, \\ud83d, which is no character: a tokenizer raises TypeError on
    # a text that has it.
    def tokenizer(text, add_special_tokens, split_special_tokens):
        return {"input_ids": list(text.encode())}

    tokens = tree_grpo.encode(tokenizer, json.loads('"half \\ud83d of one"'))
    assert bytes(tokens).decode() == "half ? of one"


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b.jsonl").write_text(lines([gsm8k("3?"), gsm8k("4?")]))
    (tmp_path / "a.json").write_text(json.dumps([gsm8k("1?"), gsm8k("2?")]))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "more").mkdir()
    assert set(read(treerl, tmp_path)) == {"1?", "2?", "3?", "4?"}
    (tmp_path / "b.jsonl").write_text(lines([gsm8k("3?"), gsm8k(answer=None)]))
    assert refusal(treerl, tmp_path).startswith("b.jsonl: record 2: answer: ")
    (tmp_path / "a.json").write_text("[{")
    assert refusal(treerl, tmp_path).startswith("a.json: it cannot be read as JSON (")


# ------------------------------------------------------------------- what is trained on or held out
@pytest.mark.parametrize(("script", "record"), [(tree_grpo, hotpot), (treerl, gsm8k)])
def test_a_text_is_either_trained_on_or_held_out(tmp_path, capsys, script, record):
    path = tmp_path / "data"
    records = [record(f"Who  is {i}?") for i in range(40)] * 9
    records += [record(f" Who is {i}?\n") for i in range(40)]  # a space is not another text
    path.write_text(lines(records))
    task = TASK[script](script.Args(data=str(path), eval_prompts=20))
    assert [len(task.training), len(task.held_out)] == [32, 8]
    assert {item.text for item in task.training + task.held_out} == {
        f"Who  is {i}?" for i in range(40)
    }
    told = "360 of 400 records left out, as an earlier one has the same text\n"
    assert capsys.readouterr().out == told


def test_a_fifth_is_held_out_at_most_so_many():
    for items, most, sizes in ((10, 9, (8, 2)), (11, 9, (8, 3)), (100, 7, (93, 7)), (2, 9, (1, 1))):
        training, held_out = split_data(list(range(items)), most)
        assert (len(training), len(held_out)) == sizes
        assert sorted(training + held_out) == list(range(items))
        assert split_data(list(range(items)), most) == (training, held_out)


def test_bad_records_are_left_out_if_asked(tmp_path, capsys):
    path = tmp_path / "data"
    records = [gsm8k(f"{i}?") for i in range(9)]
    records[3] = gsm8k(answer="one\n\ud83d")
    path.write_text(lines(records).replace('"7?"', '"7?'))  # line 8 is no JSON
    assert set(read(treerl, path, skip_bad_records=True)) == {
        f"{i}?" for i in (0, 1, 2, 4, 5, 6, 8)
    }
    told = (
        "2 of 9 records left out, the first: record 4: answer: want a number, alone or behind ####"
    )
    assert capsys.readouterr().out == f"{told}, not 'one\\n\\ud83d'\n"
    bad = hotpot("Who is B?", answer=None, context=[["X", ["X is unread."]]])
    path.write_text(lines([hotpot(), bad, hotpot("Who?")]))
    args = tree_grpo.Args(data=str(path), skip_bad_records=True)
    assert [title for title, _ in Questions(args).index.passages] == ["A", "B"]
    path.write_text(lines([gsm8k(), *[gsm8k(answer="?")] * 9]))
    with pytest.raises(ValueError, match="want two records of use or more"):
        read(treerl, path, skip_bad_records=True)


# ---------------------------------------------------------------------- data files that are refused
def refusal(script, path, content=None) -> str:
    """The message with which a script turns a data file down: a line that names flag and file."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    out = path.parent / "out"
    argv = ["--model", "none", "--data", str(path), "--out", str(out), "--device", "cpu"]
    with pytest.raises(script.BadInput) as caught:
        script.main(argv)
    message = str(caught.value)
    assert message.startswith(f"--data {path}: ")
    assert "\n" not in message
    assert not out.exists()
    return message.removeprefix(f"--data {path}: ")


@pytest.mark.parametrize(
    ("script", "record"),
    [(tree_grpo, hotpot()), (tree_grpo, musique()), (treerl, gsm8k()), (treerl, math_record())],
)
def test_a_file_that_is_cut_anywhere(tmp_path, script, record):
    # A download that broke off may end inside a word, after a bracket, or between two records.
    path = tmp_path / "cut"
    whole = json.dumps([record, record])
    for end in range(1, len(whole), 3):
        path.write_text(whole[:end])
        with pytest.raises(ValueError, match="^it cannot be read as JSON"):
            read(script, path)
    good = lines([record] * 2)
    last = json.dumps(record)
    for end in range(1, len(last), 3):
        path.write_text(good + last[:end])
        with pytest.raises(ValueError, match="^record 3: it is no JSON"):
            read(script, path)
    broken = good + last[:40] + "\n" + last  # in the middle
    assert refusal(script, path, broken).startswith("record 3: it is no JSON")


# fmt: off
WITHOUT = [  # records, the field that is taken away, and what is said
    (tree_grpo, hotpot(), "question", "question: it is missing"),
    (tree_grpo, hotpot(), "answer", "answer: it is missing"),
    (tree_grpo, hotpot(), "context", "context: there are no passages, so give --search-url"),
    (tree_grpo, musique(), "answer", "answer: it is missing"),
    (tree_grpo, musique(), "paragraphs", "context: there are no passages, so give --search-url"),
    (treerl, gsm8k(), "question", "problem, Problem, Question, question: it is missing"),
    (treerl, math500(), "problem", "problem, Problem, Question, question: it is missing"),
    (treerl, gsm8k(), "answer", "final_answer, answer, Answer: it is missing"),
    (treerl, math_record(), "solution", "final_answer, answer, Answer: it is missing"),
]
USELESS = [  # records, and the field to blame
    (gsm8k(None), "question"), (gsm8k(7.5), "question"), (gsm8k(["How many?"]), "question"),
    (gsm8k(" "), "question"), (gsm8k(answer=None), "answer"), (gsm8k(answer=["#### 42"]), "answer"),
    (gsm8k(answer=""), "answer"), (gsm8k(answer=2.5), "answer"), (gsm8k(answer=True), "answer"),
    (gsm8k(answer=float("nan")), "answer"), (gsm8k(answer="It is 42."), "answer"),
    (gsm8k(answer="#### "), "answer"), (gsm8k(answer="#### many"), "answer"),
    (gsm8k(answer="#### 3 or 4"), "answer"), (gsm8k(answer="#### 1/0"), "answer"),
    (gsm8k(answer="42\n####\n42"), "answer"), (gsm8k(answer="#### \\boxed{42"), "answer"),
    (math500(None), "problem"), (math500(answer=None), "answer"), (math500(answer=["5"]), "answer"),
    (math_record(solution=None), "solution"), (math_record(solution="It is 2."), "solution"),
    (math_record(solution="\\boxed{2"), "solution"), (math_record(solution="#### 2"), "solution"),
    ({"question": "q", "final_answer": ["1", "2"]}, "final_answer"),
    ({"question": "q", "final_answer": []}, "final_answer"),
    ({"question": "q", "final_answer": None}, "final_answer"),
    ({"question": "q", "final_answer": [None]}, "final_answer"),
    ({"question": "q", "final_answer": ["1, 2"], "is_multiple_answer": True}, "final_answer"),
    (hotpot(answer="yes"), "answer"), (gsm8k(answer="42\n\ud83d"), "answer"),
]
NO_QUESTIONS = [
    (gsm8k(), "context"), (hotpot(answer=None), "answer"), (hotpot(answer=" \n"), "answer"),
    (hotpot(answer=["Ann"]), "answer"), (hotpot(answer=0.5), "answer"),
    (hotpot(answer=True), "answer"),
    (hotpot(7.5), "question"), (hotpot(""), "question"),
    (hotpot(context=[["A", []], "B"]), "context"), ({**hotpot(), "context": []}, "context"),
    (hotpot(context="A B"), "context"), (hotpot(context=[["A", "It is."]]), "context"),
    (hotpot(context=[["A", [1, 2]]]), "context"), (hotpot(context=[[None, ["A."]]]), "context"),
    ({**hotpot(), "context": {"title": ["A"], "sentences": []}}, "context"),
    ({**hotpot(), "context": {"title": ["A"]}}, "context"),
    (musique(texts={}), "paragraphs"), ({**musique(), "paragraphs": ["A"]}, "paragraphs"),
    ({**musique(), "paragraphs": [{"title": "A"}]}, "paragraphs"),
    (musique(aliases=[""]), "answer_aliases"), (musique(aliases=[None]), "answer_aliases"),
    ({**musique(), "answer_aliases": "Ann"}, "answer_aliases"),
    ({**musique(), "golden_answers": []}, "golden_answers"),
    ({**musique(), "golden_answers": None}, "golden_answers"),
    ({**musique(), "golden_answers": ["Ann", ""]}, "golden_answers"),
    ({"messages": [{"role": "user", "content": "2 + 2?"}]}, "question"),
]
NO_RECORDS = [None, 7, "question", "7", ["question", "answer"], []]
NO_JSON = [
    "Who wrote A?\nAnn.\n", "question,answer\nWho,Ann\n", "[" * 100_000, "[" + "9" * 10_000 + "]",
    "\0" * 1000,  # what a crashed download may leave: valid UTF-8, but nothing else
    '{"version": "1.1", "data": []}', "7", '"question"',
]
# fmt: on


def test_records_of_no_use(tmp_path):
    path = tmp_path / "data"
    broken = []
    for script, good, name, said in WITHOUT:
        broken.append((script, good, {k: v for k, v in good.items() if k != name}, said))
    broken += [(treerl, gsm8k(), record, f"{name}: ") for record, name in USELESS]
    broken += [(tree_grpo, hotpot(), record, f"{name}: ") for record, name in NO_QUESTIONS]
    for script, good in ((treerl, gsm8k()), (tree_grpo, hotpot())):
        broken += [(script, good, record, "it is no JSON") for record in NO_RECORDS]
    for script, good, record, blamed in broken:
        for content in (lines([good, record, good]), json.dumps([good, record, good], indent=1)):
            message = refusal(script, path, content)
            assert message.startswith(f"record 2: {blamed}"), record
            assert ("GSM8K" in message) == (script is treerl)
            assert ("HotpotQA" in message) == (script is tree_grpo)
            assert message.endswith("or --skip-bad-records)")


@pytest.mark.parametrize("script", TASK, ids=lambda script: script.__name__)
def test_files_of_no_use(tmp_path, script):
    path = tmp_path / "data"
    for content in NO_JSON:
        refusal(script, path, content)
    for content in (b"", b"\n \n", b"[]", b"[\n]\n", b"\xef\xbb\xbf"):
        assert "want two records" in refusal(script, path, content)
    few = {tree_grpo: [musique(), musique(answerable=False)], treerl: [gsm8k()]}[script]
    assert "want two records" in refusal(script, path, lines(few))
    assert "want two records" in refusal(script, path, lines(few[:1] * 9))  # all the same
    assert "cannot be read as JSON" in refusal(script, path, b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    assert "No such file" in refusal(script, tmp_path / "missing.json")
    (tmp_path / "empty").mkdir()
    assert "ends in .json" in refusal(script, tmp_path / "empty")


@needs_math_verify
def test_a_folder_of_one_object_a_file(tmp_path):
    """As MATH was published: a folder per subject, and in each file an object over several lines."""
    for name, answer in (("algebra/1", 2), ("algebra/2", 3), ("geometry/1", 4)):
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        record = {"problem": f"1 + {answer - 1}?", "solution": f"$\\boxed{{{answer}}}$"}
        file.write_text(json.dumps(record, indent=4))
    problems = Problems(treerl.Args(data=str(tmp_path)))
    found = {(p.text, p.answer) for p in problems.training + problems.held_out}
    assert found == {("1 + 1?", "2"), ("1 + 2?", "3"), ("1 + 3?", "4")}


def test_parquet_without_pyarrow_or_content(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)  # it is not there
        assert "pip install pyarrow" in refusal(treerl, path, b"PAR1")
    pytest.importorskip("pyarrow")
    for content in (b"", b"PAR1", b"PAR1" * 99, lines([gsm8k()] * 2)):
        assert refusal(treerl, path, content).startswith("it cannot be read as Parquet (")
    assert "No such file" in refusal(treerl, tmp_path / "missing.parquet")


@pytest.mark.parametrize("record", [math500(), math_record(), CAPITAL])
def test_a_file_that_needs_a_package_that_is_missing(tmp_path, monkeypatch, record):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # it is not there
    path = tmp_path / "math.jsonl"
    assert "pip install math-verify" in refusal(treerl, path, lines([record, gsm8k()]))
    path.write_text(lines([gsm8k(), gsm8k("And now?")]))
    assert len(read(treerl, path)) == 2  # such answers are compared without it
