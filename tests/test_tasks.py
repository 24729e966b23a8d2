"""Tasks and rewards of the three scripts: all that needs no model (data files: test_data.py).

Tree-GRPO   the built-in questions, BM25, the search server, the reward
TreeRL      the built-in problems, final answers and which are right
GraphGPO    the house
all         pictures"""

import copy
import importlib.util
import json
import random
import re
import socket
import threading
from collections import Counter, deque
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

import graph_gpo
import tree_grpo
import treerl
from graph_gpo import LIDDED, PLACES, ROOMS, SUCCESS, THINGS, House, Transition
from tree_grpo import (
    BM25,
    Agent,
    ask_server,
    demonstrate,
    make_question,
    normalise,
    outcome_reward,
)
from treerl import Problem, final_answer, is_right, number

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="answers in LaTeX are compared by a package (pip install math-verify)",
)


# --------------------------------------------------------------------------- the built-in questions
def test_a_question_is_answered_by_a_search_for_each_of_its_relations():
    rng = random.Random(0)
    hops = Counter()
    for _ in range(300):
        question = make_question(rng, 4, False)
        asked = " of the ".join(reversed(question.relations))
        entity = question.start
        met = [entity]
        assert re.fullmatch(rf"(Who|Where) is the {asked} of {entity}\?", question.text)
        for relation in question.relations:
            ((_, found),) = question.passages.top(f"{relation} of {entity}", 1)
            fact, _, value = found.partition(" is ")
            assert fact == f"the {relation} of {entity}"
            entity = value
            met.append(entity)
        assert question.answers == [entity]
        assert len(set(met)) == len(met)  # the way is no circle
        assert question.text.startswith("Where" if entity in tree_grpo.CITIES else "Who")
        hops[len(question.relations)] += 1

        facts = [text.partition(" is ")[0] for _, text in question.passages.passages]
        assert len(set(facts)) == len(facts)  # no two are about the same
    assert set(hops) == {2, 3, 4}


def test_held_out_questions_and_problems_are_not_trained_on():
    # From the same random numbers, which would give the same questions and problems otherwise.
    for make, most in ((make_question, 4), (treerl.make_problem, 8)):
        held_out = {make(random.Random(seed), most, True).text for seed in range(1000)}
        trained = {make(random.Random(seed), most, False).text for seed in range(1000)}
        assert not held_out & trained


def test_demonstrations_are_well_formed_and_mostly_wrong():
    rng = random.Random(3)
    rewards = Counter()
    for _ in range(500):
        question = make_question(rng, 4, False)
        turns = demonstrate(question, rng)
        rewards[outcome_reward([text for text, _ in turns], question.answers)] += 1
        for text, found in turns[:-1]:
            query = re.search("<search> (.*)</search>", text)[1]
            assert [("", found)] == question.passages.top(query, 1)
    assert set(rewards) == {1.0, 0.2}
    assert 0.1 < rewards[1.0] / 500 < 0.4


# --------------------------------------------------------------------------------------------- BM25
# Four passages of 4, 2, 6 and 4 words, titles included, so 4 on average. With k1 = 1.2 and b = 0.75
# a word that occurs n times adds rarity x 2.2 n / (n + s), where s = 1.2 (0.25 + 0.75 words / 4):
# 1.2 for Rome, 0.75 for Oslo, 1.65 for Lima, 1.2 for Cairo. Rarity is
# ln(1 + (4 - d + 0.5) / (d + 0.5)) of a word in d passages: ln 2 = 0.693 for two, ln(10/3) = 1.204
# for one.
ROME = ("Rome", "river, river, bank")
OSLO = ("Oslo", "River")
LIMA = ("Lima", "bank of the old city")
CAIRO = ("Cairo", "a desert city")


# fmt: off
QUERIES = [  # and the best passages
    ("River", [ROME, OSLO]),  # Rome 0.693 x 4.4 / 3.2 = 0.953, Oslo 0.693 x 2.2 / 1.75 = 0.871
    ("bank", [ROME, LIMA]),  # Rome 0.693 x 2.2 / 2.2 = 0.693, Lima 0.693 x 2.2 / 2.65 = 0.575
    ("the river bank", [ROME, LIMA, OSLO]),  # 1.646, 0.575 + 0.999 for "the", 0.871
    ("river bank", [ROME, OSLO, LIMA]),  # 1.646, 0.871, 0.575
    # Cairo 1.204 x 2.2 / 2.2 = 1.204: a rare word beats a common one twice
    ("desert river", [CAIRO, ROME, OSLO]),
    # 1.204, 0.693, 0.575: a word of the query counts once
    ("bank, bank, BANK desert", [CAIRO, ROME, LIMA]),
    ("oslo", [OSLO]), ("riverbank", []), ("", []), ("?!", []),  # a title counts; no common word
]
# fmt: on


def test_bm25_by_hand():
    index = BM25([CAIRO, LIMA, OSLO, ROME])
    for query, best in QUERIES:
        assert index.top(query, 9) == best  # 9 is more than there are
        assert index.top(query, 1) == best[:1]
        assert index.top(query, 2) == best[:2]
    assert BM25([("", ""), ("", "")]).top("river", 3) == []


# -------------------------------------------------------------------------------- the search server
def send(handler, content, status=200):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def hit(contents, score=0.5):
    return {"document": {"id": "7", "contents": contents}, "score": score}


GOOD = {"result": [[hit('"Rome"\nA city.')]] * 3}


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a real server; reply(handler, number) answers its number-th POST. Returns
    the URL and the list, still growing, of what was posted."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        posted = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                posted.append((self.path, json.loads(body)))
                try:
                    reply(self, len(posted))
                except OSError:  # the client has hung up, as it should where an answer is too long
                    self.close_connection = True

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/retrieve", posted

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_failed(observations, number):
    """Nothing was raised: each query has an observation, which says that the search failed."""
    assert len(observations) == number
    assert all("fail" in text for text in observations)


def test_all_queries_go_in_one_request(serve):
    rome = hit('"Rome"\nIt is the capital\nof Italy.')
    found = [[rome, hit('"Oslo"\nIt is in Norway.'), hit('"Lima"\nToo many.')], []]
    found.append([hit("a passage without a title")])
    url, posted = serve(lambda handler, number: send(handler, {"result": found}))
    agent = object.__new__(Agent)  # of an agent a search needs nothing but its arguments
    agent.args = SimpleNamespace(search_url=url, topk=2)
    queries = ["capital of Italy", 'a "quoted" one', "trois é"]
    observations = agent.search([(None, None, query) for query in queries])
    first = '"Rome": It is the capital\nof Italy.\n"Oslo": It is in Norway.'
    assert observations == [first, "nothing found", "a passage without a title"]  # topk is 2
    assert posted == [("/retrieve", {"queries": queries, "topk": 2, "return_scores": True})]
    assert agent.search([]) == []
    assert len(posted) == 1  # nothing to ask, no request


# fmt: off
NONSENSE = [  # answers to three queries
    b"<html>busy</html>", b"", json.dumps(GOOD).encode()[:-9], b"\xff\xfe\x00" * 9,  # no JSON
    [], None, 7, {"detail": "no index loaded"},  # no results
    {"result": None}, {"result": {"0": [hit("a")]}}, {"result": [hit("a")] * 3}, {"result": []},
    {"result": [[hit("a")], None, [hit("a")]]}, {"result": [[{"contents": "a"}]] * 3},
    {"result": [[hit(None)]] * 3}, {"result": [[hit(["a", "b"])]] * 3},
    {"result": [[{"document": "a"}]] * 3}, {"result": GOOD["result"][:2]}, b"[" * 50_000,
    {"result": [[hit("x" * 10_000_000)]] * 3},  # nothing is wrong but its size
]
# fmt: on


def test_a_server_that_answers_nonsense(serve):
    url, posted = serve(lambda handler, number: send(handler, NONSENSE[number - 1]))
    for asked in range(1, len(NONSENSE) + 1):
        assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=60, tries=1), 3)
        assert len(posted) == asked


def test_a_server_that_cannot_be_asked(serve, capsys):
    over = threading.Event()
    url, _ = serve(lambda handler, number: over.wait(10))  # it never answers
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=0.2, tries=1), 3)
    over.set()
    url, _ = serve(lambda handler, number: handler.connection.shutdown(socket.SHUT_RDWR))
    for address in (url, "127.0.0.1:8000/retrieve", "localhost", "http://[::1", "http://a b/"):
        assert_failed(ask_server(address, ["a", "b"], 3, timeout=60, tries=1), 2)
    capsys.readouterr()
    with socket.socket() as taken:  # bound but not listening: it refuses, and nobody takes the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        assert_failed(ask_server(url, ["a", "b"], 3, timeout=60, tries=1), 2)
    assert "refused" in capsys.readouterr().err  # the reason is for the user, not for the policy


def test_a_server_that_fails_each_time_and_one_that_recovers(serve, monkeypatch):
    monkeypatch.setattr(tree_grpo.time, "sleep", lambda seconds: None)  # between two tries
    url, posted = serve(lambda handler, number: send(handler, b"oops", 500))
    assert_failed(ask_server(url, ["a", "b"], 3, timeout=60, tries=2), 2)
    assert len(posted) == 2
    url, posted = serve(lambda handler, number: send(handler, GOOD, 500 if number == 1 else 200))
    observations = ask_server(url, ["a", "b", "c"], 3, timeout=60, tries=2)
    assert observations == ['"Rome": A city.'] * 3
    assert len(posted) == 2
    assert posted[0] == posted[1]


# -------------------------------------------------------------------------- the reward of Tree-GRPO
def search(query="mayor of Paris", think="I look it up."):
    return f"<think>{think}</think><search>{query}</search>"


def answer(words="Paris", think="I know."):
    return f"<think>{think}</think><answer>{words}</answer>"


# fmt: off
NORMAL = {
    "The  Eiffel Tower!": "eiffel tower", "an A.B.C. of the\tU.S.\n": "abc of us", "1,000": "1000",
    "Theodore an Ananas": "theodore ananas", "Jean-Luc's": "jeanlucs", "Ångström": "ångström",
    "a": "", "": "", "$5 (five)": "5 five",
}
REWARDS = {  # of turns, and answers, if they are others than Paris
    1.0: [  # a match in a well-formed trajectory
        ([answer()],), ([search(), answer()],), ([search(), search(), search(), answer()],),
        (["\n<think>\na\nb </think>\n\n <search> q\n</search>\n", answer("\n Paris\n", "") + " "],),
        ([answer("the Beatles!")], "Beatles"), ([answer("BEATLES")], "The Beatles"),
        ([answer(" New York City ")], "NYC", "New York", "New York City"),
        ([answer("a < b")], "a < b"),
    ],
    0.8: [  # a match in a malformed one: a thought is missing, at the end or on the way
        (["<answer>Paris</answer>"],), ([search(), "<answer>the paris.</answer>"],),
        (["<search>mayor</search>", answer()],),
        # Words outside the tags, a thought that is not closed, two thoughts, the thought last.
        (["Well, " + answer()],), ([answer() + " That is it."],),
        (["<think>Hm <answer>Paris</answer>"],), (["<think>a</think>" + answer()],),
        (["<answer>Paris</answer><think>a</think>"],),
        # Two actions in a turn, of which the first counts; an action inside a thought; results
        # that the policy made up.
        ([answer() + "<search>q</search>"],), ([search() + "<search>q</search>", answer()],),
        (["<think>I <search>q</search></think><search>q</search>", answer()],),
        ([search() + "<information>It is Paris.</information>", answer()],),
        # A turn that was spent without an action.
        (["<think>Hm.</think>", answer()],), (["", answer()],),
        # An episode ends at its answer, so none has two; by the rule it is malformed, and its last
        # turn counts.
        ([answer("Rome"), answer()],),
    ],
    0.2: [  # well-formed without a match
        ([answer("Rome")],), ([search(), answer("Paris, France")],),
        ([search(), search(), answer("")],), ([answer("Pari s")], "Paris", "Lutetia"),
    ],
    0.1: [  # an answer, neither matching nor well-formed
        (["<answer>Rome</answer>"],), (["Paris <answer></answer>"],), (["", answer("Rome")],),
        ([answer("Rome") + answer("Paris")],),
    ],
    0.0: [  # no answer; in the last its search was its action
        ([""],), (["Paris"],), ([search()],), ([search(), search("Paris")],),
        (["<think>Paris</think>"],), (["<think>a</think><answer>Paris"],),
        (["<think>a</think><answer>Paris</search>"],),
        (["<think>a</think><ANSWER>Paris</ANSWER>"],), ([search() + "<answer>Paris</answer>"],),
    ],
}
# fmt: on


def test_outcome_reward():
    for text, normal in NORMAL.items():
        assert normalise(text) == normal
    for reward, cases in REWARDS.items():
        for turns, *answers in cases:
            assert outcome_reward(turns, answers or ["Paris"]) == reward, turns


# ---------------------------------------------------------------------------- the built-in problems
def test_built_in_problems_are_right_and_demonstrations_are_wrong_in_places():
    rng = random.Random(0)
    right = 0
    lines = Counter()
    for _ in range(500):
        problem = treerl.make_problem(rng, 8, False)
        start, *ops = problem.text.removeprefix("Modulo 11, from ").replace(":", "").split()
        value = int(start)
        assert 5 <= len(ops) <= 8
        for op in ops:
            value = value * int(op[1:]) if op[0] == "*" else value + int(op)
        assert problem.answer == str(value % 11)

        # A line of a demonstration is "value operation = result", and each begins where the one
        # before it ended.
        text = treerl.demonstration(problem, rng)
        *steps, last = [line.split() for line in text.splitlines()]
        assert [op for _, op, _, _ in steps] == ops
        results = [found for _, _, _, found in steps]
        assert [value for value, _, _, _ in steps] == [start, *results[:-1]]
        assert last == ["####", results[-1]]
        for a, op, _, found in steps:
            true = int(a) * int(op[1:]) if op[0] == "*" else int(a) + int(op)
            lines[op[0] == "*", true % 11 == int(found)] += 1
        right += is_right(final_answer(text, False)[1], problem)
    assert lines[False, False] == 0  # only products were learned wrong
    assert 0.4 < lines[True, True] / (lines[True, True] + lines[True, False]) < 0.6
    assert 0.25 < right / 500 < 0.55


# --------------------------------------------------------------- final answers, and which are right
# fmt: off
ANSWERS = [
    ("It is \\boxed{18}.", 6, "18"), ("\\boxed{ 18 }", 0, "18"), ("\\boxed{}", 0, ""),
    ("\\boxed{\\frac{1}{2^{3}}} it is", 0, "\\frac{1}{2^{3}}"),
    ("\\boxed{\\{1, 2\\}}", 0, "\\{1, 2\\}"),
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
    assert not is_right(None, Problem("", "18"))
    assert not is_right(None, Problem("", "18", True))


HALF = Fraction(1, 2)
# fmt: off
NUMBERS = {  # with commas as in GSM8K and as in LaTeX, currencies, units, words, a Unicode minus
    0: ["0", "-0"],
    18: ["18", "00018", " 18\n", "18.00", "18.", "$18", "\\$18", "$ 18.00", "€18", "18 €", "£18",
         "18$", "18 apples", "18 dollars.", "18cm", "18\\text{ cm}", "18°", "18 \\mathrm{kg}",
         "18\\,\\text{m}", "$18 per day", "\\text{18}", "The answer is 18.", "Total: 18", "is $18",
         "x = 18", "x=18", "\\frac{36}{2}"],
    HALF: ["0.5", ".5", "1/2", "2/4 cup", "x = 1/2", "\\frac{1}{2}", "\\dfrac{1}{2}",
           "\\tfrac{2}{4}"],
    -HALF: ["-0.50", "-1/2", "-\\frac{1}{2}"],
    50: ["50%", "50\\%", "50 %", "50 percent"],
    -5: ["-5", "\u22125", "- 5", "-$5", "$-5", "x = -5", "-5 degrees", "it is \u22125"],
    1234: ["1,234", "1{,}234"], -1234: ["-1,234"], 1234567: ["1,234,567"],
    1000: ["\\$1{,}000"], Fraction(2469, 2): ["1,234.50"],
}
NO_NUMBERS = [
    # none at all
    "", " ", "-", "$", ".", ",", "/", "many", "\\text{eighteen}", "nan", "inf", "None",
    # more than one
    "3 or 4", "3, 4", "3,4", "3 4", "3\n4", "3-4", "10-4", "10 - 4", "3/4/5", "1 1/2", "2:30",
    "3 and 4", "between 3 and 4", "3 \\text{ or } 4", "1.5.2", "1/2.5", "3|4", "3=4", "x=3, y=4",
    # commas elsewhere than between thousands
    "1,00", "12,34", "1,2345", "1,234,56", ",5", "1.000,5",
    # another value than that of the number in it, or none
    "\\sqrt{16}", "2^3", "2^{3}", "3!", "2*3", "2+3", "2_3", "-(3)", "--3", "1e3", "x<3", "x>3",
    "<3", "\\sqrt3", "3\\pi", "3\\cdot4", "1/0", "0/0", "\\frac{1}{0}", "-1/0", "\\frac{1}{x}",
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
        for gold in ("0", "1", "2", "3", "4", "6", "10", "16", "1000"):
            assert not is_right(text, Problem("", gold)), text
    # Words and letters that change the value are not left out.
    assert number("x - 3") != -3
    for text in ("3 - x", "3/x", "minus 3", "negative 3", "3 million", "3 thousand"):
        assert number(text) != 3, text


def test_long_answers_are_not_cut_to_right_ones():
    for length in (90, 100, 101, 300):
        # Whatever its length, it says 180, or 18 followed by a doubt, and not 18.
        assert number("a" * (length - 4) + " 180") != 18
        assert number("18" + " " * (length - 4) + "or 19") != 18
    for part in ("1", "1,", "-", "1/", " 1", "a", "0.", "{", "\\frac{"):
        assert not is_right(part * 5000, Problem("", "1"))
    for part in ("1", "a", "0."):
        assert not is_right(part * 5000, Problem("", "1", True))
        assert not is_right(part * 1001, Problem("", part * 1000, True))


def pairs(text: str) -> list[list[str]]:
    """Of a text "answer ~ gold ; answer ~ gold"."""
    return [[side.strip() for side in pair.split("~")] for pair in re.split("[;\n]", text.strip())]


RIGHT = pairs(r"""
\frac12 ~ 0.5 ; 0.5 ~ \frac12 ; \frac{1}{2} ~ 1/2 ; \dfrac{2}{4} ~ \frac{1}{2}
p - q ~ p - q ; p-q ~ -q + p ; x^2+2x+1 ~ (x+1)^2 ; \text{Evelyn} ~ \text{Evelyn}
(3,\pi/2) ~ \left( 3, \frac{\pi}{2} \right) ; \left(3, \frac{\pi}{2}\right) ~ (3,\pi/2)
Evelyn ~ \text{Evelyn} ; \text{(A)} ~ \text{(A)} ; \sqrt8 ~ 2\sqrt2 ; 2\sqrt{2} ~ \sqrt{8}
x=5 ~ 5 ; 5 ~ x=5 ; x = 5 ~ x=5 ; [0,1) ~ [0, 1) ; (-\infty,5] ~ (-\infty, 5]
\{2,1\} ~ \{1,2\} ; 5. ~ 5 ; 5 ~ 5. ; 1,000 ~ 1000 ; 10{,}080 ~ 10,080 ; \$5 ~ 5
5\text{ cm} ~ 5 ; 50\% ~ 50 ; 90^\circ ~ 90 ; −5 ~ -5 ; 6-5i ~ 6 - 5i ; 2516_8 ~ 2516_8
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
""")
WRONG = pairs(r"""
q - p ~ p - q ; \frac12 ~ \frac13 ; 0.333 ~ \frac13 ; 3.14 ~ \pi ; -5 ~ 5
(\pi/2,3) ~ (3,\pi/2) ; (1,2) ~ (2,1) ; 3 ~ (3,\pi/2) ; \text{Angela} ~ \text{Evelyn}
Angela ~ \text{Evelyn} ; \text{odd} ~ \text{even} ; 2\sqrt3 ~ 2\sqrt2 ; \sqrt{16} ~ 2
x=6 ~ 5 ; x \neq 5 ~ 5 ; x<5 ~ 5 ; [0,1] ~ (0,1) ; (0,1] ~ [0,1) ; \{1,3\} ~ \{1,2\}
\pm 5 ~ 5 ; 3 or 4 ~ 3 ; 3 \text{ or } 4 ~ 4 ; 3, 4 ~ 3 ; 3$ or $4 ~ 3 ; 3$ or $4 ~ 4 ; 1,2 ~ 1
11_2 ~ 3_4 ; 2^3 ~ 6 ; 1/0 ~ 1 ; \frac{1}{0} ~ 1 ; 0/0 ~ 0 ; \infty ~ 5 ; 6+5i ~ 6-5i
~ 5 ; ~ 0 ; $ ~ 5 ; $$ ~ 5 ; \ ~ 5 ; }{ ~ 5 ; % ~ 5 ; \frac{ ~ 5 ; \text{I do not know} ~ 5 ; ? ~ 5
\begin{pmatrix}1\\3\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
""")
WRONG += [[" ", "5"], ["5\x00", "5"], ["\ud83d", "5"]]
FOREVER = [["9^{9^{9^{9}}}", "5"], ["(" * 900, "5"]]  # if these hang, the test has failed


@needs_math_verify
@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, True), (WRONG, False), (FOREVER, False)])
def test_right_and_wrong_in_latex(pairs, right):
    for text, gold in pairs:
        assert is_right(text, Problem("", gold, True)) == right, (text, gold)


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
    frames = ["{}", "\\text{{{}}}", "\\operatorname{{{}}}", "${}$", "x={}", "({}, 5)"]
    problems = [Problem("", "5"), Problem("", "5", True), Problem("", "\\text{open}", True)]
    for code in codes:
        for frame in frames:
            text = frame.format(code)
            for problem in problems:
                assert not is_right(text, problem)
                is_right("5", Problem("", text, problem.latex))  # a file's answer is not either
            assert number(text) is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- the house
def deciding(house) -> tuple:
    """All of it that steps change."""
    return house.at, tuple(house.where.items()), tuple(house.how.items()), frozenset(house.open)


def put_back(house, state) -> None:
    at, where, how, opened = state
    house.at = at
    house.where = dict(where)
    house.how = dict(how)
    house.open = set(opened)


def shortest(house, actions) -> int:
    """Steps of the shortest solution with actions(house), by breadth-first search."""
    start = deciding(house)
    seen = {start}
    queue = deque([(start, 0)])
    while queue:
        state, steps = queue.popleft()
        put_back(house, state)
        for action in actions(house):
            put_back(house, state)
            _, reward, terminated, _, info = house.step(action)
            if terminated:
                assert reward == 1
                put_back(house, start)
                return steps + 1
            after = deciding(house)
            if info["valid"] and after not in seen:
                seen.add(after)
                queue.append((after, steps + 1))
    raise AssertionError("no solution")


def all_actions(house) -> list[str]:
    found = [f"go {where}" for where in (*ROOMS, *PLACES)]
    found += [f"open {place}" for place in LIDDED]
    for verb in ("take", "put", "clean", "heat", "cool"):
        found += [f"{verb} {thing}" for thing in house.where]
    return found


def actions_that_matter(house) -> list[str]:
    """Without other things, other treatments than the task's, and other lids and places to put
    something than those of the thing's place and the goal: they lead to no shorter solution."""
    room = PLACES.get(house.at, house.at)
    found = [f"go {where}" for where in (*ROOMS, *ROOMS[room])]
    if house.at in (house.start, house.goal):
        found += [f"open {house.at}", f"put {house.thing}"]
    return [*found, f"take {house.thing}", f"{house.verb} {house.thing}"]


def test_tasks_are_solvable_and_the_demonstrator_wastes_no_step():
    house = House()
    taken = set()
    for seed in range(500):
        house.reset(seed, {"held_out": seed % 2})
        house.start = house.where[house.thing]
        least = shortest(house, actions_that_matter) if seed < 100 else None
        if least and least <= 5:  # small enough to try everything
            assert shortest(house, all_actions) == least
        steps, over = 0, False
        while not over:
            _, reward, over, truncated, info = house.step(house.demonstrate())
            steps += 1
            assert (info["valid"], truncated, reward) == (True, False, float(over))
            assert steps <= 14
        assert steps == (least or steps)
        taken.add(steps)
    assert (min(taken), max(taken)) == (4, 14)  # as House says

    rng = random.Random(0)  # with its habits it errs
    acts = [house.step(house.demonstrate(rng))[4]["valid"] for _ in range(1000)]
    assert 100 < acts.count(False) < 900


def test_the_same_seed_and_actions_give_the_same():
    rng = random.Random(0)
    one = House()
    other = House()
    for seed in range(50):
        how = {"held_out": seed % 2}
        told = [one.reset(seed, how)]
        actions = [rng.choice([one.demonstrate(rng), *all_actions(one)]) for _ in range(20)]
        told += [one.step(action) for action in actions]
        other.reset(rng.randrange(99))  # whatever was there before
        other.step("go hall")
        assert [other.reset(seed, how), *(other.step(action) for action in actions)] == told
        twin = copy.deepcopy(other)
        assert twin.step("go hall") == other.step("go hall")
    assert House().reset(3) == House().reset(seed=3, options={"held_out": False})
    assert House().reset(3) != House().reset(4)


def test_held_out_tasks_are_others():
    house = House()
    seen = {True: set(), False: set()}
    for held_out in (True, False):
        for seed in range(3000):
            _, info = house.reset(seed, {"held_out": held_out})
            where = house.where[house.thing]
            seen[held_out].add((house.verb, house.thing, where, house.goal))
            assert where != house.goal
            assert house.thing in info["task"]
            assert house.goal in info["task"]
            assert house.held() == "nothing"
            assert not house.open
            assert set(house.how.values()) == {"plain"}
    assert not seen[True] & seen[False]
    tasks = 4 * len(THINGS) * 18 * 17  # a fifth of them is held out
    assert 0.7 * tasks / 5 < len(seen[True]) < tasks / 4
    assert 2000 < len(seen[False])


# fmt: off
STRANGE = [
    "", " ", "go", "go ", " kitchen", "take  mug", "go\tkitchen", "\n", "gö küche", "🙂", "go 🙂",
    "take nothing", "put nothing", "clean nothing", "open hall", "go door", "go hand", "take hand",
    "put", "go go", "x" * 9999, "open", "<action>go kitchen</action>", "\ud800", "go kitchen.",
    "please go kitchen", "take mug egg", "heat",
]
# fmt: on


def test_invalid_actions_change_nothing_and_a_key_is_a_state():
    rng = random.Random(1)
    house = House()
    invalid = 0
    of_key = {}
    of_state = {}
    for seed in range(60):
        house.reset(seed)
        for _ in range(40):
            action = rng.choice([*STRANGE, *all_actions(house), house.demonstrate()])
            before, key, look = deciding(house), house.key(), house.look()
            assert of_key.setdefault(key, before) == before
            assert of_state.setdefault(before, key) == key
            seen, _, terminated, truncated, info = house.step(action)
            assert info["state"] == house.key()
            assert not truncated
            if info["valid"]:
                assert action not in STRANGE
                assert deciding(house) != before
                assert house.key() != key
                assert seen == house.look()
            else:
                invalid += 1
                assert deciding(house) == before
                assert seen == "Nothing happens. " + look
            if terminated:
                break
    assert invalid > 1000


def test_a_hand_holds_one_thing_and_case_does_not_matter():
    house = House()
    house.reset(0)
    first, second, _ = house.where
    house.at = house.where[first] = house.where[second] = "bed"
    assert house.step(f"take {first}")[4]["valid"]
    assert not house.step(f"take {second}")[4]["valid"]
    assert house.held() == first
    assert house.where[second] == "bed"
    house.at = "hall"
    assert house.step("GO KITCHEN")[4] == {"state": house.key(), "valid": True}
    assert house.at == "kitchen"


# ----------------------------------------------------------------------------------------- pictures
def test_tree_as_mermaid():
    # n0 - n1 - n2 is tree 1, n0 - n3 is tree 2. Green or red by the sign of a value, white without.
    root = tree_grpo.Node()
    first = tree_grpo.Node(root)
    leaf = tree_grpo.Node(first)
    second = tree_grpo.Node(root, tree=1)
    words = ["Who?", "one\n  two", "three", "<b>"]
    notes = ["", "", "R = 1", "R = 0"]
    drawn = tree_grpo.mermaid([root, first, leaf, second], words, notes, [None, 0.5, -1.0, 0.0])
    assert drawn.startswith("```mermaid\nflowchart TD\n    n0[")
    assert drawn.endswith("\n```\n")
    shown = re.findall(r"\[.*\]|fill:#\w+|n\d -->.*", drawn)
    assert shown == [
        *['["Who?"]', "fill:#fff", '["one two"]', "fill:#cfc", "n0 -->|tree 1| n1"],
        *['["three<br>R = 1"]', "fill:#fcc", "n1 --> n2"],
        *['["#60;b#62;<br>R = 0"]', "fill:#eee", "n0 -->|tree 2| n3"],
    ]


def draw_graph(monkeypatch, text, transitions, A, **how) -> str:
    """The picture of a task whose steps have the advantages A; its first rollout won."""
    steps = [graph_gpo.Step(t, graph_gpo.Node(), 0.0, True) for t in transitions]
    task = graph_gpo.Task(text, graph_gpo.Node(), [1.0, 0.0], [True, False], steps)
    monkeypatch.setattr(graph_gpo, "advantages", lambda task, args: torch.tensor(A))
    return graph_gpo.picture([task], None, **how)


def test_graph_as_mermaid(monkeypatch):
    # d(m) = 1, d(s) = 2, and 3 for x, which has no way. Edges come by d(state) + d(next state):
    # m - G 1, s - m 3, s - x 5. The edge s - m was taken twice, with A = 1 and 0.5.
    ways = [("s", "to m", "m", 0), ("m", "to G", SUCCESS, 0), ("s", "to m", "m", 1)]
    graph = [Transition(*way) for way in [*ways, ("s", "to x", "x", 2)]]
    drawn = draw_graph(monkeypatch, "do it", graph, [1.0, 0.0, 0.5, -1.25])
    assert drawn.startswith("```mermaid\nflowchart TD\n    task[")
    assert drawn.endswith("\n```\n")
    assert re.findall(r"\[.*\]|fill:#\w+|stroke:#\w+|n\d -->.*", drawn) == [
        *['["Task: do it<br>3 of 3 edges"]', '["m<br>d = 1"]', "fill:#fff"],
        *['["SUCCESS<br>d = 0"]', "fill:#cfc", 'n0 -->|"to G, 1 x, A = +0.00"| n1'],
        *["stroke:#888", '["s<br>d = 2"]', "fill:#fff"],
        *['n2 -->|"to m, 2 x, A = +0.75"| n0', "stroke:#2a2", '["x<br>d = 3"]', "fill:#fff"],
        *['n2 -->|"to x, 1 x, A = -1.25"| n3', "stroke:#c22"],
    ]
    few = draw_graph(monkeypatch, "do it", graph, [0.0] * 4, most=2)  # those nearest to success
    assert "Task: do it<br>2 of 3 edges" in few
    assert few.count("-->") == 2
    assert '["x' not in few


def test_mermaid_of_strange_texts(monkeypatch):
    strange = '"A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\n\nwhy)?'
    escaped = (
        "#34;A #60;b#62;#124;C#124;#60;/b#62;#34;; #35;1 #38; #91;x#93; #123;y#125; #96;z#96; "
        "#92; --#62; (and why)?"
    )
    long = "x" * 300
    first = Transition(strange, strange, "SUCCESS", 0)
    graph = [first, Transition("SUCCESS", long, SUCCESS, 0, 0.5)]
    text = draw_graph(monkeypatch, strange, graph, [0.0, 0.0])
    assert f'["Task: {escaped}<br>' in text
    assert f'["{escaped}<br>d = 1.5"]' in text
    assert f'|"{escaped}, 1 x, A = +0.00"|' in text
    assert f'|"{long[:160]}, 1 x' in text
    assert text.count('["SUCCESS<br>') == 2  # a state of that name is no success
    assert text.count("#cfc") == 1

    # With control characters git and editors would take the file for a binary one.
    words = "".join(map(chr, range(40)))
    tree = tree_grpo.mermaid([tree_grpo.Node()], [words], [""], [None])
    graph = draw_graph(monkeypatch, words, [Transition(words, words, SUCCESS, 0)], [0.0])
    for drawn in (tree, graph):
        assert "#0;" in drawn
        assert all(c >= " " for c in drawn.replace("\n", ""))
