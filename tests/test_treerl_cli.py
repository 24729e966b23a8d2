"""treerl.py seen from outside: data files, final answers and which are right, the command line, kill and resume."""

import functools
import json
import re
import shutil
import sys
import time
from fractions import Fraction

import pytest
import torch
from outside import (
    BAD_ARGUMENTS,
    BAD_FOLDERS,
    EMPTY,
    FOREIGN,
    MACHINE,
    NASTY,
    Script,
    assert_bfloat16,
    assert_broken_record_is_refused_with_its_line,
    assert_chains,
    assert_cut_line_is_refused,
    assert_cut_list_is_refused,
    assert_empty_file_is_refused,
    assert_foreign_file_is_refused,
    assert_limits,
    assert_loads_as_qwen3,
    assert_same_first_step,
    assert_small_run,
    assert_stopped_before_breaking,
    assert_summary,
    assert_trained_model,
    assert_unreadable_files_are_refused,
    draw_tree,
    lines,
    metrics,
    snapshot,
)

import treerl
from treerl import Args, BadInput, Problem, Solver, final_answer, is_right, number, read_problems

SCRIPT = Script(treerl)
refusal = functools.partial(SCRIPT.refusal, read_problems)

@pytest.fixture
def math_verify():
    """For the tests in which answers in LaTeX are compared, or files that have such answers are read."""
    return pytest.importorskip("math_verify")


# ---------------------------------------------------------------------------------------------------------- data files
def gsm8k(question="Ann has 40 books and buys 2. How many has she?", answer="40 + 2 = <<40+2=42>>42\n#### 42"):
    """A record in GSM8K's published shape."""
    return {"question": question, "answer": answer}

def math500(problem="Compute $\\frac{1}{4} + \\frac{1}{4}$.", answer="\\frac{1}{2}"):
    """A record in the shape in which the hub has MATH-500."""
    return {"problem": problem, "solution": "Both are $\\frac{1}{4}$, so it is $\\boxed{\\frac{2}{4}}$.",
            "answer": answer, "subject": "Prealgebra", "level": 2, "unique_id": "test/prealgebra/1.json"}

def math(problem="What is $|\\{1, 2\\}|$?", solution="There are two, so it is $\\boxed{2}$."):
    """A record in MATH's published shape, whose answer is in the solution only."""
    return {"problem": problem, "level": "Level 1", "type": "Prealgebra", "solution": solution}

def hotpot():
    return {"_id": "5a7a06935542990198eaf050", "answer": "42", "question": "How many books has Ann?", "type": "bridge",
            "level": "medium", "supporting_facts": [["A", 1]], "context": [["A", ["A is a book.", " Ann has it."]]]}

@pytest.fixture(params=["lines", "list", "list over lines"])
def read(request, tmp_path):
    """read(records) -> what read_problems makes of a file of them."""
    def read(records):
        path = tmp_path / "data"
        path.write_text(lines(records) if request.param == "lines" else
                        json.dumps(records, indent=1 if request.param == "list over lines" else None))
        return read_problems(str(path))

    return read

def test_gsm8k(read):
    answers = ["40 + 2 = 42\n#### 42", "#### 1,234", "It falls.\n#### -5", "#### 1\n#### 2\n", "####  $0.50 "]
    problems = read([gsm8k(f"How many, {i}?", answer) for i, answer in enumerate(answers)])
    assert [problem.text for problem in problems] == [f"How many, {i}?" for i in range(5)]
    assert [number(problem.answer) for problem in problems] == [42, 1234, -5, 2, Fraction(1, 2)]
    assert not any(problem.latex for problem in problems)

def test_math_500(math_verify, read):
    # Its answers are in a field of their own, which is what counts, whatever the solution ends with.
    problems = read([math500(), math500("Who?", "\\text{Evelyn}")])
    assert problems == [Problem("Compute $\\frac{1}{4} + \\frac{1}{4}$.", "\\frac{1}{2}", True),
                        Problem("Who?", "\\text{Evelyn}", True)]

def test_capital_names(math_verify, read):
    problems = read([{"Question": "Where?", "Answer": "(3,\\pi/2)"}, {"Question": "When?", "Answer": "\\boxed{5}"}])
    assert problems == [Problem("Where?", "(3,\\pi/2)", True), Problem("When?", "5", True)]

@pytest.mark.parametrize("solution, answer", [
    ("So it is $\\boxed{2}$.", "2"),
    ("So it is $\\boxed{\\frac{\\sqrt{3}}{2^{n}}}$ or so.", "\\frac{\\sqrt{3}}{2^{n}}"),
    ("First $\\boxed{1}$, at last\n\\[\\boxed{ 2 }\\]", "2"),
    ("The set is $\\boxed{\\{1,2\\}}$.", "\\{1,2\\}"),
    ("It is $\\boxed{\\text{even}}.$", "\\text{even}"),
])
def test_math(math_verify, read, solution, answer):
    assert read([math(), math("And?", solution)])[1] == Problem("And?", answer, True)

@pytest.mark.parametrize("solution, answer", [("So it is $\\boxed 2$.", "2"), ("It is $\\fbox{2}$.", "2")])
def test_math_without_braces_or_with_fbox(math_verify, tmp_path, solution, answer):
    # Rare in MATH, but in it, and one such record must not make the whole file useless.
    path = tmp_path / "math.jsonl"
    path.write_text(lines([math(), math("And?", solution), math()]))
    assert read_problems(str(path))[1] == Problem("And?", answer, True)

def test_both_kinds_in_one_file(math_verify, read):
    assert [problem.latex for problem in read([gsm8k(), math500(), math(), gsm8k()])] == [False, True, True, False]

@pytest.mark.parametrize("text", [json.dumps([gsm8k("Où?"), gsm8k()], ensure_ascii=False),
                                  lines([gsm8k("Où?"), gsm8k()]).replace("\\u00f9", "ù")])
def test_byte_order_mark_and_other_line_ends(tmp_path, text):
    path = tmp_path / "data"
    path.write_bytes(b"\xef\xbb\xbf" + ("\n\n" + text + "\n \n").replace("\n", "\r\n").encode())
    assert [problem.text for problem in read_problems(str(path))] == ["Où?", gsm8k()["question"]]

@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_cut_anywhere_is_refused_with_its_last_line(tmp_path, indent):
    whole = json.dumps([gsm8k(), gsm8k("Is it [1] {or} 2?")], indent=indent)
    assert_cut_list_is_refused(refusal, tmp_path / "cut.json", whole)

@pytest.mark.parametrize("record", [gsm8k(), math500(), math()])
def test_a_line_cut_anywhere_is_refused_with_its_number(tmp_path, record):
    assert_cut_line_is_refused(refusal, tmp_path / "cut.jsonl", record)

@pytest.mark.parametrize("record, without", [
    (gsm8k(), ["question"]), (gsm8k(), ["answer"]), (math500(), ["problem"]), (math500(), ["answer", "solution"]),
    (math(), ["problem"]), (math(), ["solution"]), ({"Question": "Where?", "Answer": "5"}, ["Question"]),
    ({"Question": "Where?", "Answer": "5"}, ["Answer"]),
])
def test_a_record_without_a_field(tmp_path, record, without):
    broken = {name: value for name, value in record.items() if name not in without}
    assert_broken_record_is_refused_with_its_line(refusal, tmp_path / "data.json", record, broken)

@pytest.mark.parametrize("broken", [
    gsm8k(None), gsm8k(7), gsm8k(["How many?"]), gsm8k(""), gsm8k(" \n"),
    gsm8k(answer=None), gsm8k(answer=42), gsm8k(answer=["#### 42"]), gsm8k(answer=""),
    gsm8k(answer="It is 42."), gsm8k(answer="#### "), gsm8k(answer="#### many"), gsm8k(answer="#### 3 or 4"),
    gsm8k(answer="#### 1/0"), gsm8k(answer="42\n####\n42"),
    math500(None), math500(7), math500(" "), math500(answer=5), math500(answer=["5"]), math500(answer=" "),
    math(solution=None), math(solution="It is 2."), math(solution="\\boxed{2"),
    math(solution="#### 2"), hotpot(), None, 7, "question", ["question", "answer"],
], ids=lambda record: json.dumps(record)[-40:])
def test_a_record_with_a_field_of_no_use(tmp_path, broken):
    path = tmp_path / "data.jsonl"
    path.write_text(lines([gsm8k(), broken, gsm8k()]))
    message = refusal(path)
    assert f"{path}, line 2: " in message and "GSM8K" in message and "MATH" in message

def test_a_record_with_an_empty_box_is_left_out(math_verify, tmp_path):
    path = tmp_path / "data.jsonl"  # the published training set has such
    path.write_text(lines([math(), math(solution="It is $\\boxed{}$."), math()]))
    assert len(read_problems(str(path))) == 2

NOT_OURS = {
    **FOREIGN, "hotpot in a list": json.dumps([hotpot()] * 3), "hotpot in lines": lines([hotpot()] * 3),
    "squad": json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": []}]}),
    "chat": lines([{"messages": [{"role": "user", "content": "2 + 2?"}]}] * 3),
}

@pytest.mark.parametrize("name", NOT_OURS)
def test_foreign_json(tmp_path, name):
    assert_foreign_file_is_refused(refusal, tmp_path / "foreign.json", NOT_OURS[name])

@pytest.mark.parametrize("content", EMPTY)
def test_files_without_problems(tmp_path, content):
    assert_empty_file_is_refused(refusal, tmp_path / "empty.json", content)

def test_a_file_of_one_problem(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(lines([gsm8k()]))
    assert re.search(r"\b1 records", refusal(path))  # one to train on and one to hold out are two

def test_files_that_cannot_be_read(tmp_path):
    assert_unreadable_files_are_refused(refusal, tmp_path)

@pytest.mark.parametrize("record", [math500(), math(), {"Question": "Where?", "Answer": "5"}])
def test_a_file_that_needs_a_package_that_is_missing(tmp_path, monkeypatch, record):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # an import of it fails from here on
    path = tmp_path / "math.jsonl"
    path.write_text(lines([record] * 3))
    assert "pip install math-verify" in refusal(path)
    with pytest.raises(BadInput):  # and so before anything is made
        treerl.main(["--data", str(path), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    path.write_text(lines([gsm8k()] * 3))
    assert len(read_problems(str(path))) == 3  # such answers are compared without it


# ------------------------------------------------------------------------------------------------------- final answers
@pytest.mark.parametrize("text, start, answer", [
    ("It is \\boxed{18}.", 6, "18"), ("\\boxed{ 18 }", 0, "18"), ("\\boxed{}", 0, ""),
    ("\\boxed{\\frac{1}{2^{3}}} it is", 0, "\\frac{1}{2^{3}}"), ("\\boxed{\\{1, 2\\}}", 0, "\\{1, 2\\}"),
    ("\\boxed{17}, no, \\boxed{18}", 16, "18"), ("\\boxed{17 or \\boxed{18}}", 13, "18"),
    # One that is not closed is an answer that was cut off, and what came before it is not one.
    ("\\boxed{18", 0, None), ("\\boxed{17}, no, \\boxed{18", 16, None), ("\\boxed{\\frac{1}{2}", 0, None),
])
def test_the_last_box_is_the_final_answer(text, start, answer):
    assert final_answer(text, True) == final_answer(text, False) == (start, answer)

@pytest.mark.parametrize("text, start, answer", [
    ("40 + 2 = 42\n#### 42", 12, "42"), ("####42\n", 0, "42"), ("#### 42\nThat is 43.", 0, "42"),
    ("#### 41\n#### 42", 8, "42"), ("####", 0, ""), ("#### ", 0, ""),
])
def test_four_hashes_are_for_numbers_only(text, start, answer):
    assert final_answer(text, False) == (start, answer)
    assert final_answer(text, True) == (len(text), None)

@pytest.mark.parametrize("text, start, answer", [
    ("\\boxed{18}\n#### 17", 0, "18"), ("#### 17\n\\boxed{18}", 8, "18"), ("#### 18\n\\boxed{18", 8, None),
    ("#### \\boxed{18}", 5, "18"),
])
def test_a_box_wins_over_four_hashes(text, start, answer):
    assert final_answer(text, False) == final_answer(text, True) == (start, answer)

@pytest.mark.parametrize("text", ["", "18", "The answer is 18.", "### 18", "boxed{18}", "# # # # 18"])
def test_no_final_answer(text):
    assert final_answer(text, False) == final_answer(text, True) == (len(text), None)
    assert not is_right(None, Problem("", "18")) and not is_right(None, Problem("", "18", True))

HALF = Fraction(1, 2)

@pytest.mark.parametrize("text, value", [
    ("18", 18), ("0", 0), ("-0", 0), ("00018", 18), (" 18\n", 18),
    # Commas between thousands, as in GSM8K and as in LaTeX.
    ("1,234", 1234), ("1,234,567", 1234567), ("1{,}234", 1234), ("1,234.50", Fraction(2469, 2)),
    # Decimals.
    ("18.00", 18), ("0.5", HALF), (".5", HALF), ("-0.50", -HALF), ("18.", 18),
    # Currencies.
    ("$18", 18), ("\\$18", 18), ("$ 18.00", 18), ("€18", 18), ("18 €", 18), ("£18", 18), ("18$", 18),
    ("\\$1{,}000", 1000),
    # Units and words.
    ("18 apples", 18), ("18 dollars.", 18), ("18cm", 18), ("18\\text{ cm}", 18), ("18 \\mathrm{kg}", 18),
    ("$18 per day", 18), ("\\text{18}", 18), ("The answer is 18.", 18), ("Total: 18", 18), ("x = 18", 18), ("x=18", 18),
    ("18°", 18), ("18\\,\\text{m}", 18), ("is $18", 18),
    # Percent.
    ("50%", 50), ("50\\%", 50), ("50 %", 50), ("50 percent", 50),
    # Negative ones, the Unicode minus among them.
    ("-5", -5), ("\u22125", -5), ("- 5", -5), ("-$5", -5), ("$-5", -5), ("x = -5", -5), ("it is \u22125", -5),
    ("-1,234", -1234), ("-5 degrees", -5),
    # Fractions.
    ("1/2", HALF), ("-1/2", -HALF), ("2/4 cup", HALF), ("x = 1/2", HALF), ("\\frac{1}{2}", HALF),
    ("\\dfrac{1}{2}", HALF), ("\\tfrac{2}{4}", HALF), ("-\\frac{1}{2}", -HALF), ("\\frac{36}{2}", 18),
])
def test_a_number(text, value):
    assert number(text) == value
    assert is_right(text, Problem("", str(value))) and not is_right(text, Problem("", str(value + 1)))

@pytest.mark.parametrize("text", [
    "", " ", "-", "$", ".", ",", "/", "many", "\\text{eighteen}", "nan", "inf", "None",
    # More than one number.
    "3 or 4", "3, 4", "3,4", "3 4", "3\n4", "3-4", "10-4", "10 - 4", "3/4/5", "1 1/2", "2:30", "3 and 4",
    "between 3 and 4", "3 \\text{ or } 4", "1.5.2", "1/2.5", "3|4", "3=4", "x=3, y=4",
    # Commas elsewhere than between thousands.
    "1,00", "12,34", "1,2345", "1,234,56", ",5", "1.000,5",
    # What has another value than the number in it, or none.
    "\\sqrt{16}", "2^3", "2^{3}", "3!", "2*3", "2+3", "2_3", "-(3)", "--3", "1e3", "x<3", "x>3", "<3", "\\sqrt3",
    "3\\pi", "3\\cdot4", "1/0", "0/0", "\\frac{1}{0}", "-1/0", "\\frac{1}{x}",
])
def test_no_number(text):
    assert number(text) is None
    assert not any(is_right(text, Problem("", answer)) for answer in ("0", "1", "2", "3", "4", "6", "10", "16", "1000"))

@pytest.mark.parametrize("text, value", [
    ("x - 3", -3), ("3 - x", 3), ("3/x", 3), ("minus 3", 3), ("negative 3", 3), ("3 million", 3), ("3 thousand", 3),
])
def test_words_and_letters_that_change_the_value_are_not_left_out(text, value):
    assert number(text) != value

def test_long_answers(math_verify):
    for part in ("1", "1,", "-", "1/", " 1", "a", "0.", "{", "\\frac{"):
        assert not is_right(part * 5000, Problem("", "1"))
    for part in ("1", "a", "0."):
        assert not is_right(part * 5000, Problem("", "1", True))

@pytest.mark.parametrize("length", [90, 100, 101, 300])
def test_a_long_answer_is_not_cut_to_a_right_one(length):
    # Whatever its length, it says 180, or 18 followed by a doubt, and not 18.
    assert number("a" * (length - 4) + " 180") != 18
    assert number("18" + " " * (length - 4) + "or 19") != 18

def test_a_long_answer_in_latex_is_not_cut_to_a_right_one(math_verify):
    assert not is_right("1" * 1001, Problem("", "1" * 1000, True))

@pytest.mark.parametrize("answer, gold", [
    ("\\frac12", "0.5"), ("0.5", "\\frac12"), ("\\frac{1}{2}", "1/2"), ("\\dfrac{2}{4}", "\\frac{1}{2}"),
    ("p - q", "p - q"), ("p-q", "-q + p"), ("x^2+2x+1", "(x+1)^2"),
    ("(3,\\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)"), ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
    ("\\text{Evelyn}", "\\text{Evelyn}"), ("Evelyn", "\\text{Evelyn}"), ("\\text{(A)}", "\\text{(A)}"),
    ("\\sqrt8", "2\\sqrt2"), ("2\\sqrt{2}", "\\sqrt{8}"), ("x=5", "5"), ("5", "x=5"), ("x = 5", "x=5"),
    ("[0,1)", "[0, 1)"), ("(-\\infty,5]", "(-\\infty, 5]"), ("\\{2,1\\}", "\\{1,2\\}"),
    ("5.", "5"), ("5", "5."), ("1,000", "1000"), ("10{,}080", "10,080"), ("\\$5", "5"), ("5\\text{ cm}", "5"),
    ("50\\%", "50"), ("90^\\circ", "90"), ("\u22125", "-5"), ("6-5i", "6 - 5i"), ("2516_8", "2516_8"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
])
def test_right_in_latex(math_verify, answer, gold):
    assert is_right(answer, Problem("", gold, True))

@pytest.mark.parametrize("answer, gold", [
    ("q - p", "p - q"), ("\\frac12", "\\frac13"), ("0.333", "\\frac13"), ("3.14", "\\pi"), ("-5", "5"),
    ("(\\pi/2,3)", "(3,\\pi/2)"), ("(1,2)", "(2,1)"), ("3", "(3,\\pi/2)"),
    ("\\text{Angela}", "\\text{Evelyn}"), ("Angela", "\\text{Evelyn}"), ("\\text{odd}", "\\text{even}"),
    ("2\\sqrt3", "2\\sqrt2"), ("\\sqrt{16}", "2"), ("x=6", "5"), ("x \\neq 5", "5"), ("x<5", "5"),
    ("[0,1]", "(0,1)"), ("(0,1]", "[0,1)"), ("\\{1,3\\}", "\\{1,2\\}"), ("\\pm 5", "5"),
    ("3 or 4", "3"), ("3 \\text{ or } 4", "4"), ("3, 4", "3"), ("3$ or $4", "3"), ("3$ or $4", "4"), ("1,2", "1"),
    ("11_2", "3_4"), ("2^3", "6"), ("1/0", "1"), ("\\frac{1}{0}", "1"), ("0/0", "0"), ("\\infty", "5"),
    ("6+5i", "6-5i"),
    ("", "5"), (" ", "5"), ("", "0"), ("$", "5"), ("$$", "5"), ("\\", "5"), ("}{", "5"), ("%", "5"), ("\\frac{", "5"),
    ("5\x00", "5"), ("\ud83d", "5"), ("\\text{I do not know}", "5"), ("?", "5"),
    ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
])
def test_wrong_in_latex(math_verify, answer, gold):
    assert not is_right(answer, Problem("", gold, True))

@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "(" * 900])
def test_an_answer_that_would_take_forever_is_wrong_in_seconds(math_verify, answer):
    began = time.monotonic()
    assert not is_right(answer, Problem("", "5", True))
    assert time.monotonic() - began < 20

def test_answers_are_never_evaluated_as_code(math_verify, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = ["__import__('os').system('touch made')", "open('made','w')", "exec(\"open('made','w')\")",
             "[open(f,'w') for f in ('made',)]", "5 if open('made','w') else 5", "lambda: open('made','w')"]
    frames = ["{}", "\\text{{{}}}", "\\operatorname{{{}}}", "${}$", "x={}", "({}, 5)"]
    for text in (frame.format(code) for frame in frames for code in codes):
        for problem in (Problem("", "5"), Problem("", "5", True), Problem("", "\\text{open}", True)):
            assert not is_right(text, problem), text
            is_right("5", Problem("", text, problem.latex))  # an answer of a file is not either
        assert number(text) is None or "5" in text
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- command line
KEYS = {"event", "step", "reward", "success", "pass_rate", "generated_tokens", "forwarded_tokens", "loss", "kl",
        "entropy", "grad_norm", "lr", "sampler_gap", *MACHINE}
# Just enough supervised steps that some leaves earn more than others: without that all advantages and gradients are 0.
SMALL = ["--sft-steps", "32", "--ops", "5", "--prompts", "3", "--eval-prompts", "4", "--M", "2", "--max-tokens", "32",
         "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.0005", "--warmup", "2", "--kl-coef", "0.01"]

def draw(out):
    """draw_tree, after a check that all nodes but the prompt have an R(s) or A, and exactly the leaves an outcome."""
    labels, edges, leaves = draw_tree(out)
    for node, label in labels.items():
        note = re.search(r"<br>(?:R\(s\)|A) = [+-]\d+\.\d\d(, right|, wrong)?(, not kept)?$", label)
        assert bool(note) == (node != 0), label
        assert not note or bool(note[1]) == (node in leaves) and (not note[2] or node in leaves), label
    return labels, edges, leaves

@pytest.fixture(scope="session")
def files(models, tmp_path_factory):
    """A folder of data files and models, good and bad, that many tests use and none changes."""
    folder = tmp_path_factory.mktemp("data") / "files"
    shutil.copytree(models, folder)
    good = lines([gsm8k(f"{NASTY} {i}", f"#### {i}") for i in range(6)])
    (folder / "gsm8k.jsonl").write_text(good)
    (folder / "math500.jsonl").write_text(lines([math500(f"{NASTY} {i}", f"\\frac{{{i}}}{{2}}") for i in range(6)]))
    (folder / "math.json").write_text(json.dumps([math(f"{NASTY} {i}") for i in range(6)], indent=1))
    (folder / "empty.json").write_text("")
    (folder / "cut.jsonl").write_text(good[: len(good) // 2 + 40])
    (folder / "foreign.json").write_text(json.dumps([hotpot()] * 3))
    (folder / "one.jsonl").write_text(lines([gsm8k()]))
    return folder

def test_built_in_run_leaves_its_metrics(whole):
    assert_small_run(metrics(whole[0]), 5, KEYS)
    steps = metrics(whole[0], "train")
    assert all(row["kl"] > 0 for row in steps[1:])  # from the second step on it is not the reference model any more
    assert all(0 <= row["reward"] == row["success"] <= row["pass_rate"] <= 1 for row in steps)
    assert [row["lr"] for row in steps] == pytest.approx([0.00025, *[0.0005] * 4])
    # Three prompts of 9 tokens and all sampled tokens, less one per prompt, go through the model.
    assert all(0 < row["forwarded_tokens"] <= 3 * 9 + row["generated_tokens"] - 3 for row in steps)
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps[1:]) and any(row["reward"] > 0 for row in steps)
    assert len({row["loss"] for row in steps[1:]}) == 4

def test_built_in_run_draws_a_tree(whole):
    labels, edges, leaves = draw(whole[0])
    assert re.fullmatch(r"Modulo 11, from \d+:( [-+*]\d){5}", labels[0])
    assert len(leaves) <= 2 * (1 + 2 * 1 * 2)  # M (1 + N L T)
    assert [parent for parent, _ in edges].count(0) >= 2 < len(leaves)  # two trees at least, with forks

def test_built_in_run_ends_with_a_summary(whole):
    assert_summary(*whole, ("generated_tokens", "forwarded_tokens"))

def test_built_in_run_leaves_a_model_for_transformers(whole):
    assert_trained_model(whole[0], "Modulo 11, from 3: +4 *2 -1\n 3 +4 = 7\n#### 10", most=16)

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    assert_same_first_step(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_chains_in_bfloat16_without_a_reference(quick_run, whole, tmp_path):
    arguments = [*SMALL, "--method", "chainrl", "--M", "6", "--dtype", "bfloat16", "--prompts", "4", "--steps", "2",
                 "--model", whole[0] / "start"]
    assert quick_run(tmp_path, *arguments).returncode == 0
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("treerl-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None] and any(row["grad_norm"] > 0 for row in steps)
    assert_bfloat16(out)
    _, edges, leaves = draw(out)
    assert_chains(edges, leaves, 6)

@pytest.mark.parametrize("method, N, L, T, most", [
    ("treerl", 3, 2, 1, 2 * (1 + 3 * 2 * 1)), ("treerl", 1, 1, 3, 2 * (1 + 1 * 1 * 3)), ("treerl", 2, 0, 2, 2),
    ("treerl", 0, 2, 2, 2), ("random", 2, 1, 2, 2 * (1 + 2 * 1 * 2)), ("random", 3, 2, 1, 2 * (1 + 3 * 2 * 1)),
])
def test_the_sizes_of_trees(quick_run, whole, tmp_path, method, N, L, T, most):
    arguments = [*SMALL, "--method", method, "--N", N, "--L", L, "--T", T, "--steps", "1", "--out", "out"]
    assert quick_run(tmp_path, *arguments, "--model", whole[0] / "start").returncode == 0
    _, edges, leaves = draw(tmp_path / "out")
    if most == 2:
        assert_chains(edges, leaves, 2)
    else:
        assert 2 < len(leaves) <= most

def test_other_places_are_forked_at_random(quick_run, whole, tmp_path):
    # The same model, problems and random numbers for the trunks, so that what differs is the search.
    for method in ("treerl", "random"):
        arguments = [*SMALL, "--method", method, "--steps", "1", "--out", method, "--model", whole[0] / "start"]
        assert quick_run(tmp_path, *arguments).returncode == 0
    assert (tmp_path / "treerl" / "tree.md").read_text() != (tmp_path / "random" / "tree.md").read_text()

def test_some_leaves_are_kept_and_a_right_one_among_them(quick_run, whole, tmp_path):
    seen = 0
    for seed, keep in enumerate([3, 1, 1, 1]):
        arguments = [*SMALL, "--keep", keep, "--steps", "1", "--seed", seed, "--out", seed, "--prompts", "6"]
        assert quick_run(tmp_path, *arguments, "--model", whole[0] / "start").returncode == 0
        labels, _, leaves = draw(tmp_path / str(seed))
        right = {leaf for leaf in leaves if ", right" in labels[leaf]}
        kept = {leaf for leaf in leaves if "not kept" not in labels[leaf]}
        assert len(kept) == keep < len(leaves)
        assert not right or right & kept
        seen += keep == 1 and 0 < len(right) < len(leaves) / 2
    assert seen > 1, "too few right leaves in the runs, so this test has shown nothing"

def test_no_steps(quick_run, whole, tmp_path):
    result = quick_run(tmp_path, *SMALL, "--steps", "0", "--model", whole[0] / "start", "--out", "out")
    assert result.returncode == 0 and "0 steps, 0 generated tokens" in result.stdout
    assert [(row["event"], row["step"]) for row in metrics(tmp_path / "out")] == [("eval", 0)]

def test_limits_of_a_model_that_is_given(quick_run, whole, tmp_path):
    arguments = ["--steps", "0", "--eval-prompts", "2", "--model", whole[0] / "start", "--out", "out"]
    assert_limits(quick_run(tmp_path, *arguments), tmp_path / "out", lr=1.5e-6, max_tokens=8192)

def assert_searched(result, out, problems):
    """A run with --eval-only left one row and printed what is in it, and neither trained nor saved anything."""
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = metrics(out)
    assert (row["event"], row["step"], row["problems"]) == ("search", 0, problems)
    assert row.keys() == {"event", "step", "problems", "generated_tokens", "pass_rate", "accuracy",
                          "distinct_answers_per_1000_tokens"}
    assert 0 <= row["accuracy"] <= row["pass_rate"] <= 1 and row["generated_tokens"] > 0
    assert row["pass_rate"] * problems == pytest.approx(round(row["pass_rate"] * problems))  # a number of problems
    *lines, last = result.stdout.splitlines()
    assert last == f"metrics in {out.name}/metrics.jsonl" or last.startswith("metrics in runs/treerl-")
    printed = dict(re.fullmatch(r"(.*\S) +(\S+)", line).groups() for line in lines)
    assert printed.keys() == {name.replace("_", " ") for name in row.keys() - {"event", "step"}}
    for name, value in printed.items():
        assert float(value.replace(",", "")) == pytest.approx(row[name.replace(" ", "_")], abs=5e-5)
    assert "training" not in result.stderr and "Traceback" not in result.stderr
    return row

def test_search_only_on_built_in_problems(quick_run, whole, tmp_path):
    arguments = [*SMALL, "--eval-only", "--eval-prompts", "20", "--model", whole[0] / "start", "--out", "out"]
    row = assert_searched(quick_run(tmp_path, *arguments), tmp_path / "out", 20)
    assert row["pass_rate"] > 0 and row["distinct_answers_per_1000_tokens"] > 0
    chains = quick_run(tmp_path, *arguments[:-1], "chains", "--method", "chainrl")
    assert assert_searched(chains, tmp_path / "chains", 20)["generated_tokens"] < row["generated_tokens"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]

def test_search_only_with_a_model_warm_started_for_it(quick_run, tmp_path):
    result = quick_run(tmp_path, *SMALL, "--sft-steps", "2", "--eval-only", "--out", "out")
    assert_searched(result, tmp_path / "out", 4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl", "start"}

@pytest.mark.parametrize("wanted, problems", [("200", 6), ("4", 4), ("1", 1)])
def test_search_only_on_all_of_a_file(quick_run, files, tmp_path, wanted, problems):
    arguments = ["--model", files / "qwen3", "--data", files / "gsm8k.jsonl", "--eval-only", "--eval-prompts", wanted]
    result = quick_run(tmp_path, *arguments, "--M", "2", "--max-tokens", "8", "--out", "out")
    assert_searched(result, tmp_path / "out", problems)

def test_a_qwen3_with_a_chat_template_on_gsm8k(quick_run, files, tmp_path):
    arguments = ["--model", files / "qwen3", "--data", files / "gsm8k.jsonl", "--steps", 1, "--prompts", 2, "--M", 3,
                 "--max-tokens", 16, "--out", "out"]
    process = quick_run(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    (step,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert KEYS <= set(step)
    assert 0 < step["generated_tokens"] <= 2 * 3 * (1 + 2 * 1 * 2) * 16  # no solution is longer than --max-tokens
    assert step["lr"] == pytest.approx(1.5e-7)  # 1.5e-6 in 10 steps
    assert [row["step"] for row in evals] == [0, 1] and "held-out success" in process.stdout
    labels, _, leaves = draw(tmp_path / "out")
    assert 3 < len(leaves) <= 3 * (1 + 2 * 1 * 2) and "wrote" in labels[0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")

@pytest.mark.parametrize("name", ["math500.jsonl", "math.json"])
def test_a_qwen3_with_a_chat_template_on_math(math_verify, quick_run, files, tmp_path, name):
    arguments = ["--model", files / "qwen3", "--data", files / name, "--steps", 1, "--prompts", 2, "--M", 2,
                 "--max-tokens", 16]
    result = quick_run(tmp_path, *arguments, "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1, 1]
    assert "wrote" in draw(tmp_path / "out")[0][0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")
    result = quick_run(tmp_path, *arguments[:4], "--eval-only", "--M", 2, "--max-tokens", 16, "--out", "search")
    assert_searched(result, tmp_path / "search", 6)

def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path):
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", "1e10", "--prompts", "8",
                 "--model", whole[0] / "start"]
    assert_stopped_before_breaking(quick_run(tmp_path, *arguments, "--out", "out"), tmp_path / "out")

def prompt(folder, problem, **given):
    model, tokenizer = treerl.load_model(str(folder), torch.device("cpu"))
    return tokenizer.decode(Solver(model, tokenizer, Args(**given), [], []).root(problem).tokens)

def test_the_prompt(files, whole):
    problem = Problem("What is 2 + 2?\n", "4")
    asked = prompt(files / "qwen3", problem)
    assert asked.startswith("<|im_start|>user\n") and asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "\\boxed{}" in asked and problem.text in asked
    assert prompt(files / "qwen3", problem, data="gsm8k.jsonl") == asked
    # Without a chat template: a problem of a file with the request, a built-in one, as in the warm start, bare.
    plain = prompt(whole[0] / "start", problem, data="gsm8k.jsonl")
    assert "\\boxed{}" in plain and plain.endswith(problem.text)
    assert prompt(whole[0] / "start", problem) == problem.text


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(quick_run, whole, tmp_path):
    SCRIPT.assert_resumes_after_a_kill(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(quick_run, whole, tmp_path):
    # Its model is the folder that `whole` warm-started, so it is to be the same run.
    SCRIPT.assert_resumes_after_ctrl_c(quick_run, tmp_path, whole[0], *SMALL, *FIVE, "--model", whole[0] / "start")


# ----------------------------------------------------------------------------------------------------------- bad input
OWN_BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --method grpo|--method TreeRL|--T 0|--T -1|--T 1.5|--keep 0|--keep all|--ops 4|--ops 33|--max-tokens 0
    --sft-steps -1|--K 2|--eval-only=yes|--eval 4|--eval-every -1|--max-turns 3|--search-url http://127.0.0.1:8000
""".strip())

@pytest.mark.parametrize("line", BAD_ARGUMENTS + OWN_BAD_ARGUMENTS)
def test_bad_argument(quick_run, tmp_path, line):
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, re.split("[ =]", line)[0], line)

@pytest.mark.parametrize("flag, line", [
    ("--data", "--data {files}/missing.json"), ("--data", "--data {files}/empty.json"), ("--data", "--data {files}"),
    ("--data", "--data {files}/cut.jsonl --model {files}/qwen3"), ("--data", "--data {files}/foreign.json"),
    ("--data", "--data {files}/qwen3/model.safetensors"), ("--data", "--data {files}/one.jsonl"),
    ("--data", "--data {files}/gsm8k.jsonl"), ("--data", "--data {files}/gsm8k.jsonl --eval-only"),  # without --model
    ("--data", "--data {files}/one.jsonl --eval-only"), ("--data", "--data {files}/empty.json --eval-only"),
    ("--model", "--model {files}/short --data {files}/gsm8k.jsonl"),
    ("--model", "--model {files}/short --data {files}/gsm8k.jsonl --eval-only"),
    ("--eval-only", "--resume {runs}/good --eval-only"), ("--keep", "--resume {runs}/good --keep 4"),
    ("--method", "--resume {runs}/good --method chainrl"), ("--data", "--resume {runs}/good --data gsm8k.jsonl"),
    *BAD_FOLDERS,
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    line = line.format(files=files, runs=runs)
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, flag, line, files, runs)

def test_bad_data_is_named_with_its_line(quick_run, files, tmp_path):
    SCRIPT.assert_bad_data_is_named_with_its_line(quick_run, tmp_path, files / "cut.jsonl")

def test_a_process_of_its_own_is_as_quiet(files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    SCRIPT.assert_refused(SCRIPT.run(tmp_path, "--data", files / "cut.jsonl"), "--data")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    SCRIPT.assert_refused_before_slow_imports(tmp_path, "--method", "grpo")
