"""TreeRL's problems: the built-in ones, final answers, and which are right (data files: test_data.py)."""

import importlib.util
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest
from problems import Problem, calculate, final_answer, is_right, number
from sums import Sums, make_problem

from treerl import Args

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="answers in LaTeX are compared by a package (pip install math-verify)",
)


# ---------------------------------------------------------------------------- the built-in problems
def test_built_in_problems_are_right_and_demonstrations_are_wrong_in_places():
    rng = random.Random(0)
    sums = Sums(Args())
    right = 0
    lines = Counter()
    for _ in range(500):
        problem = sums.draw(rng)
        start, *ops = problem.text.removeprefix("Modulo 11, from ").replace(":", "").split()
        value = int(start)
        assert 5 <= len(ops) <= 8
        for op in ops:
            value = value * int(op[1:]) if op[0] == "*" else value + int(op)
        assert problem.answer == str(value % 11)

        # A line of a demonstration is "value operation = result", and each begins where the one
        # before it ended.
        text = sums.demonstrate(problem, rng)
        *steps, last = [line.split() for line in text.splitlines()]
        assert [op for _, op, _, _ in steps] == ops
        results = [found for _, _, _, found in steps]
        assert [value for value, _, _, _ in steps] == [start, *results[:-1]]
        assert last == ["####", results[-1]]
        for a, op, _, found in steps:
            true = int(a) * int(op[1:]) if op[0] == "*" else int(a) + int(op)
            lines[op[0] == "*", true % 11 == int(found)] += 1
        assert text[sums.answer_start(problem, text) :] == f"#### {results[-1]}"
        right += sums.reward(problem, text)
    assert lines[False, False] == 0  # only products were learned wrong
    assert 0.4 < lines[True, True] / (lines[True, True] + lines[True, False]) < 0.6
    assert 0.25 < right / 500 < 0.55


def test_held_out_problems_are_not_trained_on_and_may_be_longer():
    # From the same random numbers, which would give the same problems otherwise.
    held_out = {make_problem(random.Random(seed), 8, True).text for seed in range(1000)}
    trained = {make_problem(random.Random(seed), 8, False).text for seed in range(1000)}
    assert not held_out & trained

    sums = Sums(Args(eval_prompts=300), "12")
    assert not {problem.text for problem in sums.held_out} & trained
    drawn = [sums.draw(random.Random(seed)) for seed in range(300)]
    for problems in (sums.held_out, drawn):
        lengths = {len(problem.text.split()) - 4 for problem in problems}  # "Modulo 11, from 5:"
        assert (min(lengths), max(lengths)) == (5, 12)


# --------------------------------------------------------------- final answers, and which are right
# fmt: off
ANSWERS = [
    ("It is \\boxed{18}.", 6, "18"), ("\\boxed{ 18 }", 0, "18"), ("\\boxed{}", 0, ""),
    ("\\boxed{\\frac{1}{2^{3}}} it is", 0, "\\frac{1}{2^{3}}"), ("It is \\fbox{18}.", 6, "18"),
    ("\\boxed{\\{1, 2\\}}", 0, "\\{1, 2\\}"), ("$\\boxed 2$", 1, "2"),
    ("\\boxed{17}, no, \\boxed{18}", 16, "18"), ("\\boxed{17 or \\boxed{18}}", 13, "18"),
    # One that is not closed was cut off, and what came before it is not the answer.
    ("\\boxed{18", 0, None), ("\\boxed{17}, no, \\boxed{18", 16, None),
    ("\\boxed{\\frac{1}{2}", 0, None),
    # A box wins over four hashes.
    ("\\boxed{18}\n#### 17", 0, "18"), ("#### 17\n\\boxed{18}", 8, "18"),
    ("#### 18\n\\boxed{18", 8, None), ("#### \\boxed{18}", 5, "18"),
]
HASHES = [
    ("40 + 2 = 42\n#### 42", 12, "42"), ("####42\n", 0, "42"), ("#### 42\nThat is 43.", 0, "42"),
    ("#### 41\n#### 42", 8, "42"), ("####", 0, ""), ("#### ", 0, ""),
]
NO_ANSWERS = ["", "18", "The answer is 18.", "### 18", "boxed{18}", "# # # # 18"]
# fmt: on


def test_the_final_answer_is_the_last_box_or_behind_four_hashes():
    for text, start, said in ANSWERS:
        assert final_answer(text, True) == final_answer(text, False) == (start, said), text
    for text, start, said in HASHES:  # they are for numbers only
        assert final_answer(text, False) == (start, said), text
        assert final_answer(text, True) == (len(text), None), text
    for text in NO_ANSWERS:
        assert final_answer(text, True) == final_answer(text, False) == (len(text), None), text


def test_nothing_equals_nothing():
    for nothing in (None, "", " ", "\\,"):
        for gold in ("18", "", " ", "\\,"):
            assert not is_right(nothing, Problem("", gold)), (nothing, gold)
            assert not is_right(nothing, Problem("", gold, True)), (nothing, gold)
    assert not is_right("18", Problem("", ""))


HALF = Fraction(1, 2)
# fmt: off
NUMBERS = {  # with commas as in GSM8K and as in LaTeX, currencies, units, words, dashes as a minus
    0: ["0", "-0"],
    18: ["18", "00018", " 18\n", "18.00", "18.", "$18", "\\$18", "$ 18.00", "€18", "18 €", "£18",
         "18$", "18 apples", "18 dollars.", "18cm", "18\\text{ cm}", "18°", "18 \\mathrm{kg}",
         "18\\,\\text{m}", "$18 per day", "\\text{18}", "The answer is 18.", "Total: 18", "is $18",
         "x = 18", "x=18", "\\frac{36}{2}", "\\$18.00", "18¢", "= 18",
         # units with powers, degrees
         "18 \\text{ m}^2", "18\\,\\text{cm}^3", "18 m^{2}", "18 ft²", "18 \\text{ m/s}^2",
         "18 square feet", "18 cm squared", "18^\\circ", "18^{\\circ}", "18^\\circ C", "18°C",
         # fonts and spaces
         "\\textbf{18}", "\\mathbf{18}", "\\mathbf{18} \\textbf{ apples}", "\\textbf{\\text{18}}",
         "18 \\textrm{ hours}", "18~\\text{m}", "18 \\mathrm{~m}", "18\\quad\\text{hours}", "~18",
         "18\\;\\text{m}", "18\u2009m", "18\u202fm", "18\u00a0m", "**18**", "**18.**",
         # formulas and parentheses
         "\\(18\\)", "\\[18\\]", "$18$", "$$18$$", "(18)", "\\left(18\\right)", "(18 dollars)",
         "18 (eighteen)", "18 dollars (eighteen)",
         # true equations
         "10 + 8 = 18", "18 = 10 + 8", "3 \\times 6 = 18", "3 × 6 = 18", "3 \\cdot 6 = 18",
         "3 * 6 = 18", "3 x 6 = 18", "36 \\div 2 = 18", "36 ÷ 2 = 18", "36/2 = 18", "20 - 2 = 18",
         "\\frac{36}{2} = 18", "\\frac{10 + 8}{1} = 18", "2 \\times (4 + 5) = 18", "18 = 18.0",
         "$10 + $8 = $18", "3 * 6 apples = 18 apples", "Total = 10 + 8 = 18", "2 + 2 * 8 = 18",
         "The total is 10 + 8 = 18 dollars.", "20 - 4 + 2 = 18", "72 / 2 / 2 = 18", "10 - -8 = 18"],
    HALF: ["0.5", ".5", "1/2", "2/4 cup", "x = 1/2", "\\frac{1}{2}", "\\dfrac{1}{2}",
           "\\tfrac{2}{4}", "\\frac12", "\\frac{1}2", "1 / 3 + 1 / 6 = 0.5"],
    -HALF: ["-0.50", "-1/2", "-\\frac{1}{2}"],
    Fraction(5, 2): ["2\\frac{1}{2}", "2 \\frac{1}{2}", "2\\frac12 \\text{ hours}", "5/2", "2.5"],
    -Fraction(5, 2): ["-2\\frac{1}{2}"],
    Fraction(3, 4): ["\\frac34", "\\dfrac{3}{4}"],
    50: ["50%", "50\\%", "50 %", "50 percent"],
    -5: ["-5", "\u22125", "\u20135", "- 5", "-$5", "$-5", "x = -5", "-5 degrees",
         "it is \u22125", "3 - 8 = -5"],
    1080: ["1,080", "1 080", "1\\,080", "1\\;080", "1{,}080", "1,\\!080", "1\u2009080",
           "1\u202f080", "\\$1 080.00", "1,000 + 80 = 1,080"],
    1234: ["1,234", "1{,}234"], -1234: ["-1,234"], 1234567: ["1,234,567", "1 234 567"],
    1000: ["\\$1{,}000"], Fraction(2469, 2): ["1,234.50"],
}
NO_NUMBERS = [
    # none at all
    "", " ", "-", "$", ".", ",", "/", "()", "=", "many", "\\text{eighteen}", "nan", "inf", "None",
    # more than one
    "3 or 4", "3, 4", "3,4", "3 4", "3\n4", "3-4", "10-4", "10 - 4", "3/4/5", "1 1/2", "2:30",
    "3 and 4", "between 3 and 4", "3 \\text{ or } 4", "1.5.2", "1/2.5", "3|4", "3=4", "x=3, y=4",
    "3 \\text{ apples and 3 pears}", "3 apples or four", "3 (or four)", "3 point five", "3$4", "2:3",
    # commas and spaces elsewhere than between thousands
    "1,00", "12,34", "1,2345", "1,234,56", ",5", "1.000,5", "1 0", "1 00", "10 80", "1 0000",
    "1 000 0", "1,000 000", "1, 000",
    # another value than that of the number in it, or none
    "\\sqrt{16}", "2^3", "2^{3}", "3!", "2*3", "2+3", "2_3", "-(3)", "--3", "1e3", "x<3", "x>3",
    "<3", "\\sqrt3", "3\\pi", "3\\cdot4", "1/0", "0/0", "\\frac{1}{0}", "-1/0", "\\frac{1}{x}",
    "3x^2", "3 e^2", "3 cars^2", "3 (million)", "3 and a half", "\\frac123", "3)", "(3", "x = 1 + 2",
    # equations that are false, say nothing, or cannot be checked
    "3 = 1 + 3", "1 + 3 = 3", "2 = 3", "1 = 2 = 3", "x = 2 = 3", "1 + 2 = 2 + 1", "3 =", "= ",
    "3 = x", "2x = 6", "1 week = 3", "3 == 3", "1/0 = 3", "10 / 3 = 3.33",
]
# fmt: on


def test_numbers():
    for value, texts in NUMBERS.items():
        for text in texts:
            assert number(text) == value, text
            assert is_right(text, Problem("", str(value))), text
            assert not is_right(text, Problem("", str(value + 1))), text
    for text in NO_NUMBERS:
        assert number(text) is None, text
        for gold in ("0", "1", "2", "3", "4", "6", "10", "16", "18", "1000"):
            assert not is_right(text, Problem("", gold)), text
    # Words and letters that change the value are not left out.
    assert number("x - 3") != -3
    for text in ("3 - x", "3/x", "minus 3", "negative 3", "3 million", "3 thousand"):
        assert number(text) != 3, text
    assert is_right("1 080", Problem("", "1,080"))  # golds of GSM8K have commas
    assert not is_right("1 8", Problem("", "18"))


def test_calculations():
    third = Fraction(1, 3)
    # fmt: off
    for text, value in [
        ("7", 7), ("1/3", third), ("-1/3", -third), ("2 + 3 * 4", 14), ("(2 + 3) * 4", 20),
        ("8 - 3 - 2", 3), ("8 / 4 / 2", 1), ("8 - (3 - 2)", 7), ("2 1⁄3", 2 + third), ("-2*-3", 6),
        ("0.1 + 0.2", Fraction(3, 10)), ("(((4)))", 4), ("6/2*3", 9), ("1" * 100, int("1" * 100)),
    ]:
        assert calculate(text) == value, text
    for text in ["", " ", "+", "2 +", "* 2", "2 2", "(2", "(2 3", "2)", "()", "1/0", "1/(2 - 2)", "2 ** 3",
                 "2 // 3", "2(3)", "x", "2x", "2^3", "1,000", "1e3", "0x10", "1_000", "\u0663 3",
                 "1" * 101, "(" * 100, "-" * 100]:
        assert calculate(text) is None, text
    # fmt: on


def test_long_answers_are_not_cut_to_right_ones():
    for length in (90, 100, 101, 300):
        # Whatever its length, it says 180, or 18 followed by a doubt, and not 18.
        assert number("a" * (length - 4) + " 180") != 18
        assert number("18" + " " * (length - 4) + "or 19") != 18
        assert number("18 " + "a" * length) == (18 if length == 90 else None)
    start = time.perf_counter()
    for part in ("1", "1,", "-", "1/", " 1", "a", "0.", "{", "\\frac{", "(", "=", "1 000 ", "$"):
        assert not is_right(part * 5000, Problem("", "1")), part
    for part in ("1", "a", "0."):
        assert not is_right(part * 5000, Problem("", "1", True))
        assert not is_right(part * 1001, Problem("", part * 1000, True))
    assert time.perf_counter() - start < 5
    assert is_right("a" * 1001, Problem("", "a" * 1001, True))  # equal as text


def pairs(text: str) -> list[list[str]]:
    """Of a text "answer ~ gold ; answer ~ gold"."""
    return [[side.strip() for side in pair.split("~")] for pair in re.split("[;\n]", text.strip())]


RIGHT = pairs(r"""
\frac12 ~ 0.5 ; 0.5 ~ \frac12 ; \frac{1}{2} ~ 1/2 ; \dfrac{2}{4} ~ \frac{1}{2} ; 2\frac12 ~ 2.5
p - q ~ p - q ; p-q ~ -q + p ; x^2+2x+1 ~ (x+1)^2 ; \text{Evelyn} ~ \text{Evelyn}
(3,\pi/2) ~ \left( 3, \frac{\pi}{2} \right) ; \left(3, \frac{\pi}{2}\right) ~ (3,\pi/2)
Evelyn ~ \text{Evelyn} ; \text{(A)} ~ \text{(A)} ; \sqrt8 ~ 2\sqrt2 ; 2\sqrt{2} ~ \sqrt{8}
x=5 ~ 5 ; 5 ~ x=5 ; x = 5 ~ x=5 ; [0,1) ~ [0, 1) ; (-\infty,5] ~ (-\infty, 5]
\{2,1\} ~ \{1,2\} ; 5. ~ 5 ; 5 ~ 5. ; 1,000 ~ 1000 ; 10{,}080 ~ 10,080 ; \$5 ~ 5
5\text{ cm} ~ 5 ; 50\% ~ 50 ; 90^\circ ~ 90 ; −5 ~ -5 ; 6-5i ~ 6 - 5i ; 2516_8 ~ 2516_8
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix}1\\(2)\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix}1\\ 2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
50 ~ 50\% ; 50 ~ 50 \% ; 0.5 ~ 50\% ; 12.5\% ~ 12.5 ; 12.5 ~ 12.5\% ; 56\% ~ 0.56 = 56\%
1000 ~ 1,000 ; 1\,000 ~ 1000 ; 1 000 ~ 1000 ; 1,\!000 ~ 1000 ; 1,000x ~ 1000x ; \$1,234.50 ~ 1234.5
101_2 ~ 101_{2} ; 101_{2} ~ 101_2 ; 101_2 ~ 101 ; 24 ~ 24_{10} ; \text{A5}_{11} ~ A5_{11}
x = 43_5 ~ 43_5. ; -37_8 ~ -37_{8}
2 + 3 = 5 ~ 5 ; f(x) = 5 ~ 5 ; A_1 = 5 ~ 5 ; \sqrt{25} = 5 ~ 5 ; x = 2 + 3 = 5 ~ 5 ; \frac{10}{2} = 5 ~ 5 ; \cos 60^\circ = \frac12 ~ \frac12
5\quad\text{cm} ~ 5 ; $5$ ~ 5 ; \(5\) ~ 5 ; $43_5$ ~ 43_5
–5 ~ -5 ; 5–x ~ 5-x ; \text{a–b “c” ‘d’} ~ \text{a-b "c" 'd'}
0.1\pi ~ \frac{\pi}{10} ; 5.0\text{ cm} ~ 5
""")
RIGHT += [["5~\\text{cm}", "5"], ["5\u202f\\text{cm}", "5"], ["caf\u00e9", "cafe\u0301"]]
WRONG = pairs(r"""
q - p ~ p - q ; \frac12 ~ \frac13 ; 0.333 ~ \frac13 ; 3.14 ~ \pi ; -5 ~ 5
(\pi/2,3) ~ (3,\pi/2) ; (1,2) ~ (2,1) ; 3 ~ (3,\pi/2) ; \text{Angela} ~ \text{Evelyn}
Angela ~ \text{Evelyn} ; \text{odd} ~ \text{even} ; 2\sqrt3 ~ 2\sqrt2 ; \sqrt{16} ~ 2
x=6 ~ 5 ; x \neq 5 ~ 5 ; x<5 ~ 5 ; [0,1] ~ (0,1) ; (0,1] ~ [0,1) ; \{1,3\} ~ \{1,2\}
\pm 5 ~ 5 ; 3 or 4 ~ 3 ; 3 \text{ or } 4 ~ 4 ; 3, 4 ~ 3 ; 3$ or $4 ~ 3 ; 3$ or $4 ~ 4 ; 1,2 ~ 1
11_2 ~ 3_4 ; 2^3 ~ 6 ; 1/0 ~ 1 ; \frac{1}{0} ~ 1 ; 0/0 ~ 0 ; \infty ~ 5 ; 6+5i ~ 6-5i
~ 5 ; ~ 0 ; $ ~ 5 ; $$ ~ 5 ; \ ~ 5 ; }{ ~ 5 ; % ~ 5 ; \frac{ ~ 5 ; \text{I do not know} ~ 5 ; ? ~ 5
\begin{pmatrix}1\\3\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
0.3333333333 ~ \frac13 ; \frac13 ~ 0.3333333333 ; 3.14159265 ~ \pi ; (0.3333333, 1) ~ (\frac13, 1)
1.4142136 ~ \sqrt2 ; 0.33333333\text{ cm} ~ \frac13 ; 5\% ~ 0.5 ; 5\% ~ 500 ; 49\% ~ 50
1,000 ~ 100 ; 1,00 ~ 100 ; 1,234 ~ (1,234) ; 1234 ~ (1,234) ; 100,200 ~ (100, 200)
101 ~ 101_2 ; 101_3 ~ 101_2 ; 5 ~ 101_2 ; 101_2 ~ 5 ; 24_5 ~ 24_{10} ; 100_2 ~ 101_2
2 = 3 ~ 3 ; x = 2 = 3 ~ 3 ; 1 + 1 = 3 ~ 3 ; \frac{7}{2} = 3 ~ 3 ; 500 + 400 = 1,000 ~ 1000
x = 2 = 3 ~ x = 3 ; y = 3 ~ x = 3 ; 2x = 5 ~ 5 ; x + 1 = 5 ~ 5 ; \sqrt{16} = 5 ~ 5 ; 5x ~ 5 ; 5i ~ 5 ; 5\pi ~ 5
""")
WRONG += [[" ", "5"], ["5\x00", "5"], ["\ud83d", "5"]]
FOREVER = [["9^{9^{9^{9}}}", "5"], ["(" * 900, "5"]]


@needs_math_verify
@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, True), (WRONG, False)])
def test_right_and_wrong_in_latex(pairs, right):
    for text, gold in pairs:
        assert is_right(text, Problem("", gold, True)) == right, (text, gold)


@needs_math_verify
def test_no_answer_is_compared_for_long():
    start = time.perf_counter()
    for text, gold in FOREVER:
        assert not is_right(text, Problem("", gold, True)), (text, gold)
    assert time.perf_counter() - start < 20


@needs_math_verify
def test_answers_are_never_evaluated_as_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = [
        "__import__('os').system('touch made')",
        "open('made','w')",
        "exec(\"open('made','w')\")",
        "[open(f,'w') for f in ('made',)]",
        "5 if open('made','w') else 5",
        "lambda: open('made','w')",
    ]
    frames = ["{}", "\\text{{{}}}", "\\operatorname{{{}}}", "${}$", "x={}", "({}, 5)", "5 = {}"]
    problems = [Problem("", "5"), Problem("", "5", True), Problem("", "\\text{open}", True)]
    for code in codes:
        for frame in frames:
            text = frame.format(code)
            for problem in problems:
                assert not is_right(text, problem)
                is_right("5", Problem("", text, problem.latex))  # a file's answer is not either
            assert number(text) is None
    assert not list(tmp_path.iterdir())
