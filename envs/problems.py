"""Problems of a file for treerl.py --data: GSM8K, MATH, AIME, AMC, OlympiadBench."""

import importlib.util
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from records import read_records, split_data, text_of

TYPOGRAPHY = str.maketrans("−–—‒‐‑“”‘’\u00a0\u2009\u202f", "------\"\"''   ")
GROUPED = re.compile(  # a number with commas or spaces between thousands
    r"(?<![0-9.,])[0-9]{1,3}([, ])[0-9]{3}(?:\1[0-9]{3})*(?![0-9])"
)
FONT = re.compile(r"\\(?:text|math)(?:rm|bf|it)?(?=\s*\{)|\\(?:left|right)(?=[()])")
FRACTION = re.compile(r"\\[dt]?frac\s*(\{[0-9]+\}|[0-9])\s*(\{[0-9]+\}|[0-9])")
QUOTIENT = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
MEASURE = r"[cdkm]?m|in|ft|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|[a-z]*met(?:er|re)s?|units?|s"
POWER = re.compile(rf"(?<![A-Za-z])({MEASURE})\s*(?:\^\s*[23]|[²³])")  # cm^2
VALUE = r"(?:[0-9]+\s+)?[0-9]+⁄[0-9]+|[0-9]*\.?[0-9]+"  # 2 1⁄2 is two and a half
ALONE = re.compile(rf"[-+]?\s*(?:{VALUE}|[0-9]+/[0-9]+)")
SIDE = re.compile(  # a calculation, and a unit that does not change its value
    r"(?P<calculation>[-+*/().0-9⁄\s]*[0-9).]\s*)"
    r"(?!(?i:hundred|thousand|[mbtr]+illion|lakh|dozen|point|squared|cubed|k|bn|quarters?)\b)"
    r"(?![MBxi]\b)(?!.*\b(?i:and|or|times|plus|minus)\b)"
    r"(?:(?:/(?=[A-Za-z]{2}))?[A-Za-z%°¢][A-Za-z%°¢. /]*)?"
)
NAME = re.compile(  # x, f(x), a text, or an angle's function, which is not calculated
    r"\s*(?:\\?[A-Za-z]\w*(?:\([a-z, ]*\))?|\\text\s*\{[^{}]*\}|"
    r"\\(?:sin|cos|tan|cot|sec|csc).*)\s*"
)
BASED = re.compile(r"(?:[A-Za-z]=)?(?:\\text\{)?(-?[0-9A-Z]+)\}?(?:_\{?([0-9]+)\}?)?\.?")  # 101_2


class Problem(NamedTuple):
    text: str
    answer: str
    latex: bool = False  # compared by math_verify, as in MATH; else as numbers, as in GSM8K


def final_answer(text: str, latex: bool) -> tuple[int, str | None]:
    """Where the final answer of a solution begins, and what it says: the last \\boxed{...} or, if
    numbers are asked for and there is none, what follows the last ####. (len(text), None) without
    either, None if a brace is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        start = -1 if latex else text.rfind("####")
        if start < 0:
            return len(text), None
        return start, text[start + 4 :].split("\n")[0].strip()
    box, depth = text[start:].split("box", 1)[1].removeprefix("ed").lstrip(), 0
    if box[:1] != "{":  # \boxed 2, of which there are some in MATH
        return start, box.split("$")[0].strip() or None
    for brace in re.finditer(r"\\.|[{}]", box, re.DOTALL):  # those after a backslash do not count
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start, box[1 : brace.start()].strip()
    return start, None


def tidy(text: str) -> str:
    """A text with one kind of dash, quotation mark and space, and no $ or \\( around it."""
    text = unicodedata.normalize("NFC", text).translate(TYPOGRAPHY)
    text = re.sub(r"(?<!\\)\\[()\[\]!]", "", text)
    text = re.sub(r"(?<!\\)\\(?:[ ,;:]|q?quad(?![A-Za-z]))|~", " ", text)
    text = text.replace("{,}", ",").strip()
    return re.sub(r"^(\$\$?)([^$]*[^$\\])\1$", r"\2", text).strip()


def ungrouped(text: str) -> str:
    """A text without what separates thousands: 1,080 and 1 080 become 1080."""
    return GROUPED.sub(lambda match: re.sub("[, ]", "", match[0]), text)


def unlatex(text: str) -> str:
    """LaTeX of numbers and calculations in characters: fonts, fractions, operators, degrees,
    currencies. A fraction of two whole numbers gets a slash of its own, as in 2 1⁄2."""
    text = FRACTION.sub(r" \1⁄\2 ", FONT.sub("", text))
    text = QUOTIENT.sub(r"((\1)/(\2))", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])|[×·]|(?<=[0-9]) x (?=[0-9])", "*", text)
    text = re.sub(r"\\div(?![A-Za-z])|÷", "/", text)
    text = re.sub(r"(?:US)?\\?[$€£¥]", " ", text)
    return re.sub(r"[{}]|\\(?=%)", "", text)


def calculate(text: str) -> Fraction | None:
    """The exact value of a calculation, of + - * / and parentheses; None if the text is no such."""
    tokens = re.findall(rf"{VALUE}|\S", text)[::-1] if len(text) <= 100 else []

    def total() -> Fraction:
        value = product()
        while tokens and tokens[-1] in "+-":
            value += product() if tokens.pop() == "+" else -product()
        return value

    def product() -> Fraction:
        value = factor()
        while tokens and tokens[-1] in "*/":
            value = value * factor() if tokens.pop() == "*" else value / factor()
        return value

    def factor() -> Fraction:
        token = tokens.pop()
        if token in "+-":
            return factor() if token == "+" else -factor()
        if token == "(":
            value = total()
            if tokens.pop() != ")":
                raise ValueError
            return value
        return sum(Fraction(part.replace("⁄", "/")) for part in token.split())

    try:
        value = total()
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value


def number(text: str) -> Fraction | None:
    """The value of a text that says one number, be it with commas, a currency sign, "x =" or a unit
    around it, or as one side of an equation that is true."""
    text = tidy(text).lstrip("* \n").rstrip("*. \n")
    if len(text) > 100:
        return None
    text = POWER.sub(r"\1", unlatex(ungrouped(text))).strip()
    text = re.sub(r"^[A-Za-z ]*(?::|\bis\b)", "", text)  # The answer is
    text = re.sub(r"^\(([^()]*)\)$|(?<=\s)\(([A-Za-z ]{2,})\)$", r"\1\2", text)  # 18 (eighteen)
    sides = text.split("=")
    if len(sides) > 1 and re.fullmatch("[A-Za-z ]*", sides[0]):  # x =
        sides = sides[1:]
    found = [SIDE.fullmatch(side) for side in sides]
    if None in found:
        return None
    calculations = [match["calculation"] for match in found]
    values = {calculate(calculation) for calculation in calculations}
    alone = any(ALONE.fullmatch(calculation.strip("() ")) for calculation in calculations)
    return values.pop() if alone and len(values) == 1 else None


def values(text: str) -> set[Fraction | None]:
    """The exact value of each side of an equation, or of a text that is none; None for a side that
    is more than a calculation. 50\\% is 1/2."""
    sides = [unlatex(side).strip() for side in text.split("=")]
    found = [(calculate(side.rstrip("%")), side.endswith("%")) for side in sides]
    return {value / 100 if value is not None and percent else value for value, percent in found}


def is_right(answer: str | None, problem: Problem) -> bool:
    """Does a final answer equal the problem's? It is never evaluated as code, nor for long. None
    and a text without characters equal nothing."""
    if answer is None:
        return False
    if not problem.latex:
        value = number(answer)
        return value is not None and value == number(problem.answer)
    gold, said = tidy(problem.answer), tidy(answer)
    bare_gold, bare_said = ("".join(text.split()) for text in (gold, said))
    if not gold or not said or bare_gold == bare_said:
        return gold != "" and bare_gold == bare_said
    if len(said) > 1000 or len(values(ungrouped(said)) - {None}) > 1:  # 2 = 3
        return False
    gold_based, said_based = BASED.fullmatch(bare_gold), BASED.fullmatch(bare_said)
    # 101 is not 101_2; but where the gold says no base, the problem does.
    if gold_based and gold_based[2]:
        return bool(said_based) and gold_based.groups() == (said_based[1], said_based[2] or "10")
    if "=" in said and "=" not in gold:  # x = 5 is 5, but 2 x = 5 is not
        *others, said = said.split("=")
        if not all(NAME.fullmatch(side) or same(said, side) for side in others):
            return False
    tries = [(gold, said), (unmarked(gold), unmarked(said))]
    return any(same(*texts) for texts in dict.fromkeys(tries))  # once, where they are equal


def unmarked(text: str) -> str:
    """A text without percent signs and, where it is no list or interval, without what separates
    thousands."""
    text = re.sub(r"\\?%", "", text)
    return text if re.search(r"[(\[]|\\\{", text) else ungrouped(text)


def same(gold: str, said: str) -> bool:
    """Do two texts in LaTeX say the same? Rational numbers are compared exactly, others by
    math_verify."""
    exact = values(gold), values(said)
    if all(len(of_one) == 1 and None not in of_one for of_one in exact):
        return exact[0] == exact[1]
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]  # its other configuration, of plain expressions, uses eval
    found = [parse(f"${text.rstrip('.')}$", config, parsing_timeout=2) for text in (gold, said)]
    return verify(*found, float_rounding=12, timeout_seconds=2)


PROBLEM = ("problem", "Problem", "Question", "question")  # fields; the first that is there counts
ANSWER = ("final_answer", "answer", "Answer")


def problem_of(record: dict) -> Problem | None:
    """The problem of a record; None, if its box is empty, as a few in MATH are.
    ValueError says which field is wrong."""
    text, answers = text_of(record, *PROBLEM), record.get("final_answer")
    if isinstance(answers, list):
        if len(answers) != 1 or record.get("is_multiple_answer"):
            raise ValueError(f"final_answer: want one answer, not {answers!r:.60}")
        record = {**record, "final_answer": answers[0]}
    if "solution" in record and not record.keys() & ANSWER:
        _, answer = final_answer(text_of(record, "solution"), latex=True)
        if answer is None:
            raise ValueError("solution: there is no answer in a box")
        return Problem(text, answer, latex=True) if answer else None
    answer = text_of(record, *ANSWER)
    if "####" in answer:
        _, behind = final_answer(answer, latex=False)
        if behind is None or number(behind) is None:
            raise ValueError(f"answer: want a number behind ####, not {behind!r:.60}")
        return Problem(text, behind)
    _, boxed = final_answer(answer, latex=True)
    plain = boxed is None and not record.keys() & {"final_answer", *PROBLEM[:3]}
    if plain and (" " in answer.strip() or number(answer) is None):  # as where #### was lost
        raise ValueError(f"answer: want a number, alone or behind ####, not {answer!r:.60}")
    answer = answer.strip() if boxed is None else boxed
    return Problem(text, answer, latex=True) if answer else None


class Problems:
    """The problems of --data, in the shapes of

    GSM8K              question; answer, which ends in #### and a number
    MATH               problem; solution, with \\boxed{...}
    MATH-500, AIME     problem, Problem or Question; answer or Answer, a text or a number
    AMC, AIME          question; answer, a number
    OlympiadBench      question; final_answer, a list of one

    Answers but those behind #### are compared by math_verify."""

    def __init__(self, args):
        found = read_records(args, problem_of, "GSM8K, MATH, AIME, AMC or OlympiadBench")
        if any(problem.latex for problem in found) and not importlib.util.find_spec("math_verify"):
            raise ValueError("its answers need a package; pip install math-verify")
        self.training, self.held_out = split_data(found, args.eval_prompts)

    def answer_start(self, problem: Problem, text: str) -> int:
        """Where in a solution its final answer begins; its length if there is none."""
        return final_answer(text, problem.latex)[0]

    def reward(self, problem: Problem, text: str) -> float:
        return float(is_right(final_answer(text, problem.latex)[1], problem))
