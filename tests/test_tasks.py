"""Tasks, data and rewards of the three scripts: all that needs no model.

Tree-GRPO   the built-in questions, BM25, the search server, the reward
TreeRL      the built-in problems, final answers and which are right
GraphGPO    the house
all         data files, pictures"""

import copy
import importlib.util
import itertools
import json
import math
import random
import re
import socket
import sys
import threading
from collections import Counter, deque
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from outside import lines

import graph_gpo
import tree_grpo
import treerl
from graph_gpo import (
    LIDDED,
    PLACES,
    ROOMS,
    SUCCESS,
    THINGS,
    House,
    Transition,
    graph_mermaid,
)
from tree_grpo import BM25, Agent, ask_server, normalise, outcome_reward, read_questions
from treerl import Problem, final_answer, is_right, number, read_problems

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="answers in LaTeX are compared by a package (pip install math-verify)",
)


# --------------------------------------------------------------------------- the built-in questions
def make_question(rng, held_out=False) -> tree_grpo.Question:
    return tree_grpo.make_question(rng, 4, "anywhere", held_out)


def demonstrate(question, rng) -> list[tuple[str, str]]:
    return tree_grpo.demonstrate(question, "anywhere", rng)


def test_a_question_is_answered_by_a_search_for_each_of_its_relations():
    rng = random.Random(0)
    hops = Counter()
    for _ in range(300):
        question = make_question(rng)
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
    assert set(hops) == {2, 3, 4}


def test_no_two_facts_of_a_question_are_about_the_same():
    rng = random.Random(1)
    for _ in range(300):
        facts = [text.partition(" is ")[0] for _, text in make_question(rng).passages.passages]
        assert len(set(facts)) == len(facts)


def test_held_out_questions_are_not_trained_on():
    # From the same random numbers, which would give the same questions otherwise.
    seeds = range(1000)
    held_out = {make_question(random.Random(seed), held_out=True).text for seed in seeds}
    trained = {make_question(random.Random(seed)).text for seed in seeds}
    assert not held_out & trained


def test_demonstrations_are_well_formed_and_mostly_wrong():
    rng = random.Random(3)
    rewards = Counter()
    for _ in range(500):
        question = make_question(rng)
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


@pytest.mark.parametrize(
    ("query", "best"),
    [
        # "river": Rome 0.693 x 4.4 / 3.2 = 0.953, Oslo 0.693 x 2.2 / 1.75 = 0.871
        ("River", [ROME, OSLO]),
        # "bank": Rome 0.693 x 2.2 / 2.2 = 0.693, Lima 0.693 x 2.2 / 2.65 = 0.575
        ("bank", [ROME, LIMA]),
        # Rome 1.646, Lima 0.575 + 0.999 for "the", Oslo 0.871
        ("the river bank", [ROME, LIMA, OSLO]),
        # Rome 1.646, Oslo 0.871, Lima 0.575
        ("river bank", [ROME, OSLO, LIMA]),
        # Cairo 1.204 x 2.2 / 2.2 = 1.204: a rare word beats a common one twice
        ("desert river", [CAIRO, ROME, OSLO]),
        # 1.204, 0.693, 0.575: a word of the query counts once
        ("bank, bank, BANK desert", [CAIRO, ROME, LIMA]),
        # a title counts
        ("oslo", [OSLO]),
        # no common word, no passage
        ("riverbank", []),
        ("", []),
        ("?!", []),
    ],
)
def test_bm25_by_hand(query, best):
    index = BM25([CAIRO, LIMA, OSLO, ROME])
    assert index.top(query, 9) == best  # 9 is more than there are
    assert index.top(query, 1) == best[:1]
    assert index.top(query, 2) == best[:2]


def test_bm25_of_empty_passages():
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
    found = [
        [
            hit('"Rome"\nIt is the capital\nof Italy.'),
            hit('"Oslo"\nIt is in Norway.'),
            hit('"Lima"\nToo many.'),
        ],
        [],
        [hit("a passage without a title")],
    ]
    url, posted = serve(lambda handler, number: send(handler, {"result": found}))
    agent = object.__new__(Agent)  # of an agent a search needs nothing but its arguments
    agent.args = SimpleNamespace(search_url=url, topk=2)
    queries = ["capital of Italy", 'a "quoted" one', "trois é"]
    first, *others = agent.search([(None, query) for query in queries])
    assert re.search(
        r"Rome.*It is the capital\nof Italy\..*Oslo.*It is in Norway\.", first, re.DOTALL
    )
    assert "Lima" not in first  # the server sent one more than topk
    assert others == ["nothing found", "a passage without a title"]
    assert posted == [("/retrieve", {"queries": queries, "topk": 2, "return_scores": True})]
    assert agent.search([]) == []
    assert len(posted) == 1  # nothing to ask, no request


NONSENSE = {  # answers to three queries
    "not JSON": b"<html>busy</html>",
    "nothing": b"",
    "half of an answer": json.dumps(GOOD).encode()[:-9],
    "not text": b"\xff\xfe\x00" * 9,
    "a list": [],
    "null": None,
    "a number": 7,
    "an error": {"detail": "no index loaded"},
    "null for the result": {"result": None},
    "a dict for the result": {"result": {"0": [hit("a")]}},
    "one list for all": {"result": [hit("a")] * 3},
    "null for a query": {"result": [[hit("a")], None, [hit("a")]]},
    "hits without document": {"result": [[{"contents": "a"}]] * 3},
    "contents are null": {"result": [[hit(None)]] * 3},
    "contents are a list": {"result": [[hit(["a", "b"])]] * 3},
    "documents are text": {"result": [[{"document": "a"}]] * 3},
    "one result too few": {"result": GOOD["result"][:2]},
    "no results": {"result": []},
    "too deep": b"[" * 50_000,
    "ten megabytes": {"result": [[hit("x" * 10_000_000)]] * 3},  # nothing is wrong but its size
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_server_that_answers_nonsense(serve, name):
    url, posted = serve(lambda handler, number: send(handler, NONSENSE[name]))
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=60, tries=1), 3)
    assert len(posted) == 1


def set_clock(monkeypatch, *shown):
    """The script's clock shows these seconds, one after another, and then the last for ever."""
    seconds = itertools.chain(shown, itertools.repeat(shown[-1]))
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda seconds: None)
    monkeypatch.setattr(tree_grpo, "time", clock)


def test_a_server_that_never_answers(serve, monkeypatch):
    # The clock stands still, so it is the connection's own timeout that ends it.
    set_clock(monkeypatch, 0.0)
    over = threading.Event()

    def hang(handler, number):
        over.wait(10)
        send(handler, GOOD)

    url, _ = serve(hang)
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=0.2, tries=1), 3)
    over.set()


def test_a_server_that_answers_bit_by_bit(serve, monkeypatch):
    # Each byte comes long before a timeout that starts anew with it, so the clock decides: here
    # it shows 0 at the request and 100 seconds after the first bytes, though the answer is good.
    set_clock(monkeypatch, 0.0, 100.0)
    url, posted = serve(lambda handler, number: send(handler, GOOD))
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=60, tries=1), 3)
    assert len(posted) == 1


def test_a_server_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:  # bound but not listening: it refuses, and nobody takes the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        assert_failed(ask_server(url, ["a", "b"], 3, timeout=60, tries=1), 2)
    assert "refused" in capsys.readouterr().err  # the reason is for the user, not for the policy


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/retrieve", "localhost", "retrieve", "http://[::1", "http://a b/"]
)
def test_an_address_that_is_none(url):
    assert_failed(ask_server(url, ["a", "b"], 3, timeout=60, tries=1), 2)


def test_a_server_that_fails_each_time_and_one_that_recovers(serve, monkeypatch):
    set_clock(monkeypatch, 0.0)  # so that no time is spent between two tries
    url, posted = serve(lambda handler, number: send(handler, b"oops", 500))
    assert_failed(ask_server(url, ["a", "b"], 3, timeout=60, tries=2), 2)
    assert len(posted) == 2

    def recover(handler, number):
        if number == 1:
            send(handler, b"oops", 500)
        else:
            send(handler, GOOD)

    url, posted = serve(recover)
    observations = ask_server(url, ["a", "b", "c"], 3, timeout=60, tries=2)
    assert observations == ['"Rome": A city.'] * 3
    assert len(posted) == 2
    assert posted[0] == posted[1]


def test_a_server_that_hangs_up(serve):
    url, _ = serve(lambda handler, number: handler.connection.shutdown(socket.SHUT_RDWR))
    assert_failed(ask_server(url, ["a"], 3, timeout=60, tries=1), 1)


# -------------------------------------------------------------------------- the reward of Tree-GRPO
@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an A.B.C. of the\tU.S.\n", "abc of us"),
        ("Theodore an Ananas", "theodore ananas"),
        ("Jean-Luc's", "jeanlucs"),
        ("Ångström", "ångström"),
        ("a", ""),
        ("", ""),
        ("1,000", "1000"),
        ("$5 (five)", "5 five"),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


def search(query="mayor of Paris", think="I look it up."):
    return f"<think>{think}</think><search>{query}</search>"


def answer(words="Paris", think="I know."):
    return f"<think>{think}</think><answer>{words}</answer>"


@pytest.mark.parametrize(
    ("reward", "turns", "answers"),
    [
        # A match in a well-formed trajectory.
        (1.0, [answer()], ["Paris"]),
        (1.0, [search(), answer()], ["Paris"]),
        (1.0, [search(), search(), search(), answer()], ["Paris"]),
        (
            1.0,
            [
                "\n<think>\na\nb </think>\n\n <search> q\n</search>\n",
                answer("\n Paris\n", "") + " \n",
            ],
            ["Paris"],
        ),
        (1.0, [answer("the Beatles!")], ["Beatles"]),
        (1.0, [answer("BEATLES")], ["The Beatles"]),
        (1.0, [answer(" New York City ")], ["NYC", "New York", "New York City"]),
        (1.0, [answer("a < b")], ["a < b"]),
        # A match in a malformed one: a thought is missing, at the end or on the way.
        (0.8, ["<answer>Paris</answer>"], ["Paris"]),
        (0.8, [search(), "<answer>the paris.</answer>"], ["Paris"]),
        (0.8, ["<search>mayor</search>", answer()], ["Paris"]),
        # Words outside the tags, a thought that is not closed, two thoughts, the thought last.
        (0.8, ["Well, " + answer()], ["Paris"]),
        (0.8, [answer() + " That is it."], ["Paris"]),
        (0.8, ["<think>Hm <answer>Paris</answer>"], ["Paris"]),
        (0.8, ["<think>a</think>" + answer()], ["Paris"]),
        (0.8, ["<answer>Paris</answer><think>a</think>"], ["Paris"]),
        # Two actions in a turn, of which the first counts; an action inside a thought; results
        # that the policy made up.
        (0.8, [answer() + "<search>q</search>"], ["Paris"]),
        (0.8, [search() + "<search>q</search>", answer()], ["Paris"]),
        (0.8, ["<think>I <search>q</search></think><search>q</search>", answer()], ["Paris"]),
        (0.8, [search() + "<information>It is Paris.</information>", answer()], ["Paris"]),
        # A turn that was spent without an action.
        (0.8, ["<think>Hm.</think>", answer()], ["Paris"]),
        (0.8, ["", answer()], ["Paris"]),
        # An episode ends at its answer, so none has two; by the rule it is malformed, and its last
        # turn counts.
        (0.8, [answer("Rome"), answer()], ["Paris"]),
        # Well-formed without a match.
        (0.2, [answer("Rome")], ["Paris"]),
        (0.2, [search(), answer("Paris, France")], ["Paris"]),
        (0.2, [search(), search(), answer("")], ["Paris"]),
        (0.2, [answer("Pari s")], ["Paris", "Lutetia"]),
        # An answer, neither matching nor well-formed.
        (0.1, ["<answer>Rome</answer>"], ["Paris"]),
        (0.1, ["Paris <answer></answer>"], ["Paris"]),
        (0.1, ["", answer("Rome")], ["Paris"]),
        (0.1, [answer("Rome") + answer("Paris")], ["Paris"]),
        # No answer.
        (0.0, [""], ["Paris"]),
        (0.0, ["Paris"], ["Paris"]),
        (0.0, [search()], ["Paris"]),
        (0.0, [search(), search("Paris")], ["Paris"]),
        (0.0, ["<think>Paris</think>"], ["Paris"]),
        (0.0, ["<think>a</think><answer>Paris"], ["Paris"]),
        (0.0, ["<think>a</think><answer>Paris</search>"], ["Paris"]),
        (0.0, ["<think>a</think><ANSWER>Paris</ANSWER>"], ["Paris"]),
        (0.0, [search() + "<answer>Paris</answer>"], ["Paris"]),  # its search was its action
    ],
)
def test_outcome_reward(reward, turns, answers):
    assert outcome_reward(turns, answers) == reward


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


def test_held_out_problems_are_not_trained_on():
    # From the same random numbers, which would give the same problems otherwise.
    seeds = range(1000)
    held_out = {treerl.make_problem(random.Random(seed), 8, True).text for seed in seeds}
    trained = {treerl.make_problem(random.Random(seed), 8, False).text for seed in seeds}
    assert not held_out & trained


# --------------------------------------------------------------- final answers, and which are right
@pytest.mark.parametrize(
    ("text", "start", "said"),
    [
        ("It is \\boxed{18}.", 6, "18"),
        ("\\boxed{ 18 }", 0, "18"),
        ("\\boxed{}", 0, ""),
        ("\\boxed{\\frac{1}{2^{3}}} it is", 0, "\\frac{1}{2^{3}}"),
        ("\\boxed{\\{1, 2\\}}", 0, "\\{1, 2\\}"),
        ("\\boxed{17}, no, \\boxed{18}", 16, "18"),
        ("\\boxed{17 or \\boxed{18}}", 13, "18"),
        # One that is not closed was cut off, and what came before it is not the answer.
        ("\\boxed{18", 0, None),
        ("\\boxed{17}, no, \\boxed{18", 16, None),
        ("\\boxed{\\frac{1}{2}", 0, None),
        # A box wins over four hashes.
        ("\\boxed{18}\n#### 17", 0, "18"),
        ("#### 17\n\\boxed{18}", 8, "18"),
        ("#### 18\n\\boxed{18", 8, None),
        ("#### \\boxed{18}", 5, "18"),
    ],
)
def test_the_last_box_is_the_final_answer(text, start, said):
    assert final_answer(text, True) == (start, said)
    assert final_answer(text, False) == (start, said)


@pytest.mark.parametrize(
    ("text", "start", "said"),
    [
        ("40 + 2 = 42\n#### 42", 12, "42"),
        ("####42\n", 0, "42"),
        ("#### 42\nThat is 43.", 0, "42"),
        ("#### 41\n#### 42", 8, "42"),
        ("####", 0, ""),
        ("#### ", 0, ""),
    ],
)
def test_four_hashes_are_for_numbers_only(text, start, said):
    assert final_answer(text, False) == (start, said)
    assert final_answer(text, True) == (len(text), None)


@pytest.mark.parametrize(
    "text", ["", "18", "The answer is 18.", "### 18", "boxed{18}", "# # # # 18"]
)
def test_no_final_answer(text):
    assert final_answer(text, False) == (len(text), None)
    assert final_answer(text, True) == (len(text), None)


def test_no_answer_is_not_right():
    assert not is_right(None, Problem("", "18"))
    assert not is_right(None, Problem("", "18", True))


HALF = Fraction(1, 2)
NUMBERS = {
    "integers": {"18": 18, "0": 0, "-0": 0, "00018": 18, " 18\n": 18},
    "commas between thousands, as in GSM8K and as in LaTeX": {
        "1,234": 1234,
        "1,234,567": 1234567,
        "1{,}234": 1234,
        "1,234.50": Fraction(2469, 2),
    },
    "decimals": {"18.00": 18, "0.5": HALF, ".5": HALF, "-0.50": -HALF, "18.": 18},
    "currencies": {
        **dict.fromkeys(["$18", "\\$18", "$ 18.00", "€18", "18 €", "£18", "18$"], 18),
        "\\$1{,}000": 1000,
    },
    "units and words": {
        **dict.fromkeys(["18 apples", "18 dollars.", "18cm", "18\\text{ cm}", "18°"], 18),
        **dict.fromkeys(["18 \\mathrm{kg}", "18\\,\\text{m}", "$18 per day", "\\text{18}"], 18),
        **dict.fromkeys(["The answer is 18.", "Total: 18", "is $18", "x = 18", "x=18"], 18),
    },
    "percent": dict.fromkeys(["50%", "50\\%", "50 %", "50 percent"], 50),
    "negative ones, the Unicode minus among them": {
        **dict.fromkeys(["-5", "\u22125", "- 5", "-$5", "$-5", "x = -5", "-5 degrees"], -5),
        "it is \u22125": -5,
        "-1,234": -1234,
    },
    "fractions": {
        **dict.fromkeys(["1/2", "2/4 cup", "x = 1/2", "\\frac{1}{2}", "\\dfrac{1}{2}"], HALF),
        "\\tfrac{2}{4}": HALF,
        "-1/2": -HALF,
        "-\\frac{1}{2}": -HALF,
        "\\frac{36}{2}": 18,
    },
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number(kind):
    for text, value in NUMBERS[kind].items():
        assert number(text) == value
        assert is_right(text, Problem("", str(value)))
        assert not is_right(text, Problem("", str(value + 1)))


NO_NUMBERS = {
    "none at all": [
        *["", " ", "-", "$", ".", ",", "/", "many", "\\text{eighteen}", "nan", "inf", "None"],
    ],
    "more than one": [
        *["3 or 4", "3, 4", "3,4", "3 4", "3\n4", "3-4", "10-4", "10 - 4", "3/4/5", "1 1/2"],
        *["2:30", "3 and 4", "between 3 and 4", "3 \\text{ or } 4", "1.5.2", "1/2.5", "3|4"],
        *["3=4", "x=3, y=4"],
    ],
    "commas elsewhere than between thousands": [
        *["1,00", "12,34", "1,2345", "1,234,56", ",5", "1.000,5"],
    ],
    "another value than that of the number in it, or none": [
        *["\\sqrt{16}", "2^3", "2^{3}", "3!", "2*3", "2+3", "2_3", "-(3)", "--3", "1e3", "x<3"],
        *["x>3", "<3", "\\sqrt3", "3\\pi", "3\\cdot4", "1/0", "0/0", "\\frac{1}{0}", "-1/0"],
        *["\\frac{1}{x}"],
    ],
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_no_number(kind):
    for text in NO_NUMBERS[kind]:
        assert number(text) is None
        for gold in ("0", "1", "2", "3", "4", "6", "10", "16", "1000"):
            assert not is_right(text, Problem("", gold))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x - 3", -3),
        ("3 - x", 3),
        ("3/x", 3),
        ("minus 3", 3),
        ("negative 3", 3),
        ("3 million", 3),
        ("3 thousand", 3),
    ],
)
def test_words_and_letters_that_change_the_value_are_not_left_out(text, value):
    assert number(text) != value


@pytest.mark.parametrize("length", [90, 100, 101, 300])
def test_a_long_answer_is_not_cut_to_a_right_one(length):
    # Whatever its length, it says 180, or 18 followed by a doubt, and not 18.
    assert number("a" * (length - 4) + " 180") != 18
    assert number("18" + " " * (length - 4) + "or 19") != 18


@pytest.mark.parametrize("part", ["1", "1,", "-", "1/", " 1", "a", "0.", "{", "\\frac{"])
def test_long_answers(part):
    assert not is_right(part * 5000, Problem("", "1"))


@needs_math_verify
@pytest.mark.parametrize("part", ["1", "a", "0."])
def test_long_answers_in_latex(part):
    assert not is_right(part * 5000, Problem("", "1", True))
    assert not is_right(part * 1001, Problem("", part * 1000, True))  # nor cut to a right one


@needs_math_verify
@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("\\frac12", "0.5"),
        ("0.5", "\\frac12"),
        ("\\frac{1}{2}", "1/2"),
        ("\\dfrac{2}{4}", "\\frac{1}{2}"),
        ("p - q", "p - q"),
        ("p-q", "-q + p"),
        ("x^2+2x+1", "(x+1)^2"),
        ("(3,\\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
        ("\\text{Evelyn}", "\\text{Evelyn}"),
        ("Evelyn", "\\text{Evelyn}"),
        ("\\text{(A)}", "\\text{(A)}"),
        ("\\sqrt8", "2\\sqrt2"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("x = 5", "x=5"),
        ("[0,1)", "[0, 1)"),
        ("(-\\infty,5]", "(-\\infty, 5]"),
        ("\\{2,1\\}", "\\{1,2\\}"),
        ("5.", "5"),
        ("5", "5."),
        ("1,000", "1000"),
        ("10{,}080", "10,080"),
        ("\\$5", "5"),
        ("5\\text{ cm}", "5"),
        ("50\\%", "50"),
        ("90^\\circ", "90"),
        ("\u22125", "-5"),
        ("6-5i", "6 - 5i"),
        ("2516_8", "2516_8"),
        (
            "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
            "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        ),
    ],
)
def test_right_in_latex(text, gold):
    assert is_right(text, Problem("", gold, True))


@needs_math_verify
@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("q - p", "p - q"),
        ("\\frac12", "\\frac13"),
        ("0.333", "\\frac13"),
        ("3.14", "\\pi"),
        ("-5", "5"),
        ("(\\pi/2,3)", "(3,\\pi/2)"),
        ("(1,2)", "(2,1)"),
        ("3", "(3,\\pi/2)"),
        ("\\text{Angela}", "\\text{Evelyn}"),
        ("Angela", "\\text{Evelyn}"),
        ("\\text{odd}", "\\text{even}"),
        ("2\\sqrt3", "2\\sqrt2"),
        ("\\sqrt{16}", "2"),
        ("x=6", "5"),
        ("x \\neq 5", "5"),
        ("x<5", "5"),
        ("[0,1]", "(0,1)"),
        ("(0,1]", "[0,1)"),
        ("\\{1,3\\}", "\\{1,2\\}"),
        ("\\pm 5", "5"),
        ("3 or 4", "3"),
        ("3 \\text{ or } 4", "4"),
        ("3, 4", "3"),
        ("3$ or $4", "3"),
        ("3$ or $4", "4"),
        ("1,2", "1"),
        ("11_2", "3_4"),
        ("2^3", "6"),
        ("1/0", "1"),
        ("\\frac{1}{0}", "1"),
        ("0/0", "0"),
        ("\\infty", "5"),
        ("6+5i", "6-5i"),
        ("", "5"),
        (" ", "5"),
        ("", "0"),
        ("$", "5"),
        ("$$", "5"),
        ("\\", "5"),
        ("}{", "5"),
        ("%", "5"),
        ("\\frac{", "5"),
        ("5\x00", "5"),
        ("\ud83d", "5"),
        ("\\text{I do not know}", "5"),
        ("?", "5"),
        (
            "\\begin{pmatrix}1\\\\3\\end{pmatrix}",
            "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        ),
    ],
)
def test_wrong_in_latex(text, gold):
    assert not is_right(text, Problem("", gold, True))


@needs_math_verify
@pytest.mark.parametrize("text", ["9^{9^{9^{9}}}", "(" * 900], ids=["a tower", "brackets"])
def test_an_answer_that_would_take_forever_is_wrong(text):
    assert not is_right(text, Problem("", "5", True))  # if this hangs, it has failed


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
    verbs = ("take", "put", "clean", "heat", "cool")
    return [
        *(f"go {where}" for where in (*ROOMS, *PLACES)),
        *(f"open {place}" for place in LIDDED),
        *(f"{verb} {thing}" for verb in verbs for thing in house.where),
    ]


def actions_that_matter(house) -> list[str]:
    """Without other things, other treatments than the task's, and other lids and places to put
    something than those of the thing's place and the goal: they lead to no shorter solution."""
    room = PLACES.get(house.at, house.at)
    found = [f"go {where}" for where in (*ROOMS, *ROOMS[room])]
    if house.at in (house.start, house.goal):
        found += [f"open {house.at}", f"put {house.thing}"]
    found.append(f"take {house.thing}")
    if house.verb:
        found.append(f"{house.verb} {house.thing}")
    return found


def test_tasks_are_solvable_and_the_demonstrator_wastes_no_step():
    house = House()
    seen = Counter()
    for seed in range(100):
        house.reset(seed, {"held_out": seed % 2})
        house.start = house.where[house.thing]
        least = shortest(house, actions_that_matter)
        if least <= 5:  # small enough to try everything
            assert shortest(house, all_actions) == least
        for step in range(1, least + 1):
            _, reward, terminated, truncated, info = house.step(house.demonstrate())
            assert info["valid"]
            assert not truncated
            assert terminated == bool(reward) == (step == least)
        seen[least] += 1
    assert min(seen) >= 4
    assert max(seen) <= 14
    assert len(seen) > 6


def test_the_demonstrator_solves_every_task_without_invalid_actions():
    house = House()
    steps = Counter()
    for seed in range(500):
        house.reset(seed)
        for n in range(1, 16):
            _, reward, terminated, _, info = house.step(house.demonstrate())
            assert info["valid"]
            if terminated:
                break
        assert reward == 1
        steps[n] += 1
    assert (min(steps), max(steps)) == (4, 14)  # as House says


def test_the_demonstrator_with_habits_errs_and_is_reproducible():
    house = House()
    runs = []
    solved = 0
    invalid = 0
    for _ in range(2):
        rng = random.Random(0)
        actions = []
        for seed in range(100):
            house.reset(seed)
            for _ in range(30):
                actions.append(house.demonstrate(rng))
                *_, terminated, _, info = house.step(actions[-1])
                invalid += not info["valid"]
                if terminated:
                    solved += 1
                    break
        runs.append(actions)
    assert runs[0] == runs[1]
    assert solved < 190  # of 200 rollouts
    assert invalid > 400


def history(house, seed, actions, held_out) -> list:
    """All that a house says."""
    return [house.reset(seed, {"held_out": held_out}), *(house.step(action) for action in actions)]


def test_the_same_seed_and_actions_give_the_same():
    rng = random.Random(0)
    one = House()
    other = House()
    for seed in range(50):
        held_out = seed % 2
        one.reset(seed, {"held_out": True})
        choices = all_actions(one)
        actions = [rng.choice([one.demonstrate(rng), *choices]) for _ in range(20)]
        told = history(one, seed, actions, held_out)
        other.reset(rng.randrange(99))  # whatever was there before
        other.step("go hall")
        assert history(other, seed, actions, held_out) == told
        assert history(House(), seed, actions, held_out) == told
        twin = copy.deepcopy(other)
        assert twin.step("go hall") == other.step("go hall")
    assert House().reset(3) == House().reset(3, None)
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
            assert house.thing in THINGS
            assert where in PLACES
            assert house.goal in PLACES
            assert where != house.goal
            assert house.thing in info["task"]
            assert house.goal in info["task"]
            assert house.at in ROOMS
            assert house.held() == "nothing"
            assert not house.open
            assert set(house.how.values()) == {"plain"}
    assert not seen[True] & seen[False]

    def tasks(distinct: int) -> int:
        """n distinct ones of N equally likely after 3000 draws: n = N (1 - exp(-3000 / N))."""
        return next(N for N in range(1, 99_999) if N * (1 - math.exp(-3000 / N)) >= distinct)

    held_out = tasks(len(seen[True]))
    trained = tasks(len(seen[False]))
    assert 0.17 < held_out / (held_out + trained) < 0.23  # about a fifth
    assert held_out + trained == pytest.approx(4 * len(THINGS) * 18 * 17, rel=0.1)


STRANGE = [
    *[
        "",
        " ",
        "go",
        "go ",
        " kitchen",
        "take  mug",
        "go\tkitchen",
        "\n",
        "gö küche",
        "🙂",
        "go 🙂",
    ],
    *["take nothing", "put nothing", "clean nothing", "open hall", "go door", "go hand"],
    *["take hand", "put", "go go", "x" * 9999, "open", "<action>go kitchen</action>", "\ud800"],
    *["go kitchen.", "please go kitchen", "take mug egg", "heat"],
]


def test_invalid_actions_change_nothing():
    rng = random.Random(1)
    house = House()
    invalid = 0
    for seed in range(60):
        house.reset(seed)
        for _ in range(40):
            action = rng.choice([*STRANGE, *all_actions(house), house.demonstrate()])
            before = deciding(house)
            key = house.key()
            look = house.look()
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
                assert house.key() == key
                assert seen == "Nothing happens. " + look
            if terminated:
                break
    assert invalid > 1000


def test_a_hand_holds_one_thing():
    house = House()
    house.reset(0)
    first, second, _ = house.where
    house.at = house.where[first] = house.where[second] = "bed"
    *_, info = house.step(f"take {first}")
    assert info["valid"]
    *_, info = house.step(f"take {second}")
    assert not info["valid"]
    assert house.held() == first
    assert house.where[second] == "bed"


def test_case_does_not_matter():
    house = House()
    seeds = (seed for seed in range(99) if House().reset(seed)[1]["state"].startswith("hall"))
    house.reset(next(seeds))
    *_, info = house.step("GO KITCHEN")
    assert info == {"state": house.key(), "valid": True}
    assert house.at == "kitchen"


def test_a_key_is_a_state():
    rng = random.Random(2)
    house = House()
    for seed in range(5):
        house.reset(seed)
        start = deciding(house)
        of_key = {}
        of_state = {}
        for _ in range(30):
            put_back(house, start)
            for _ in range(40):
                house.step(rng.choice([*all_actions(house), house.demonstrate(rng)]))
                assert of_key.setdefault(house.key(), deciding(house)) == deciding(house)
                assert of_state.setdefault(deciding(house), house.key()) == house.key()
        assert len(of_key) > 20


# --------------------------------------------------------------------------------------- data files
READ = {tree_grpo: read_questions, treerl: read_problems}
both_scripts = pytest.mark.parametrize("script", READ, ids=lambda script: script.__name__)


def hotpot(question="Who wrote A?", answer="Ann", context=None, **more):
    """A record in HotpotQA's published shape: sentences after the first begin with a space."""
    return {
        "_id": "5a7a06935542990198eaf050",
        "answer": answer,
        "question": question,
        "type": "bridge",
        "level": "medium",
        "supporting_facts": [["A", 1]],
        "context": context or [["A", ["A is a book.", " Ann wrote it."]], ["B", ["B is a town."]]],
        **more,
    }


def musique(
    question="Who wrote A?",
    answer="Ann",
    aliases=("Ann Smith", "A. Smith"),
    answerable=True,
    texts=None,
):
    """A record in MuSiQue's published shape."""
    texts = texts or {"A": "A is a book.", "B": "B is a town."}
    paragraphs = []
    for i, (title, text) in enumerate(texts.items()):
        paragraphs.append(
            {"idx": i, "title": title, "paragraph_text": text, "is_supporting": i == 0}
        )
    return {
        "id": "2hop__13548_13529",
        "paragraphs": paragraphs,
        "question": question,
        "question_decomposition": [],
        "answer": answer,
        "answer_aliases": list(aliases),
        "answerable": answerable,
    }


def gsm8k(
    question="Ann has 40 books and buys 2. How many has she?",
    answer="40 + 2 = <<40+2=42>>42\n#### 42",
):
    """A record in GSM8K's published shape."""
    return {"question": question, "answer": answer}


def math500(problem="Compute $\\frac{1}{4} + \\frac{1}{4}$.", answer="\\frac{1}{2}"):
    """A record in the shape in which the hub has MATH-500."""
    return {
        "problem": problem,
        "solution": "Both are $\\frac{1}{4}$, so it is $\\boxed{\\frac{2}{4}}$.",
        "answer": answer,
        "subject": "Prealgebra",
        "level": 2,
        "unique_id": "test/prealgebra/1.json",
    }


def math_record(problem="What is $|\\{1, 2\\}|$?", solution="There are two: $\\boxed{2}$."):
    """A record in MATH's published shape, whose answer is in the solution only."""
    return {"problem": problem, "level": "Level 1", "type": "Prealgebra", "solution": solution}


@pytest.fixture(params=["lines", "list", "list over lines"])
def written(request, tmp_path):
    """written(records) -> the path of a file of them, in each of the ways to write it."""

    def write(records):
        path = tmp_path / "data"
        if request.param == "lines":
            path.write_text(lines(records))
        else:
            indent = 1 if request.param == "list over lines" else None
            path.write_text(json.dumps(records, indent=indent))
        return str(path)

    return write


def test_hotpotqa(written):
    other = [["C", ["C is a river."]], ["A", ["A is a book.", " Ann wrote it."]]]
    path = written([hotpot(), hotpot("What is C?", "a river", other)])
    first, second = read_questions(path)
    assert (first.text, first.answers) == ("Who wrote A?", ["Ann"])
    assert (second.text, second.answers) == ("What is C?", ["a river"])
    # A search looks into the passages of all questions; one that two of them share is there once.
    assert first.passages is second.passages
    assert first.passages.passages == [
        ("A", "A is a book. Ann wrote it."),
        ("B", "B is a town."),
        ("C", "C is a river."),
    ]


def test_2wikimultihopqa(written):
    # HotpotQA's shape with some fields more, one of them a list of triples, and sentences without
    # spaces before them.
    record = hotpot(
        context=[["A", ["A is a book.", "Ann wrote it."]]],
        evidences=[["A", "author", "Ann"]],
    )
    questions = read_questions(written([record] * 2))
    assert [(q.text, q.answers) for q in questions] == [("Who wrote A?", ["Ann"])] * 2
    assert questions[0].passages.passages == [("A", "A is a book. Ann wrote it.")]


def test_musique_keeps_aliases_and_leaves_out_the_unanswerable(written):
    unanswerable = musique("Who wrote C?", answerable=False)
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
    assert [number(problem.answer) for problem in problems] == [42, 1234, -5, 2, HALF]
    assert not any(problem.latex for problem in problems)


@needs_math_verify
def test_math_500(written):
    # Its answers are in a field of their own, which is what counts, whatever the solution says.
    problems = read_problems(written([math500(), math500("Who?", "\\text{Evelyn}")]))
    assert problems == [
        Problem("Compute $\\frac{1}{4} + \\frac{1}{4}$.", "\\frac{1}{2}", True),
        Problem("Who?", "\\text{Evelyn}", True),
    ]


@needs_math_verify
def test_capital_names(written):
    records = [
        {"Question": "Where?", "Answer": "(3,\\pi/2)"},
        {"Question": "When?", "Answer": "\\boxed{5}"},
    ]
    problems = [Problem("Where?", "(3,\\pi/2)", True), Problem("When?", "5", True)]
    assert read_problems(written(records)) == problems


@needs_math_verify
@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So it is $\\boxed{2}$.", "2"),
        ("So it is $\\boxed{\\frac{\\sqrt{3}}{2^{n}}}$ or so.", "\\frac{\\sqrt{3}}{2^{n}}"),
        ("First $\\boxed{1}$, at last\n\\[\\boxed{ 2 }\\]", "2"),
        ("The set is $\\boxed{\\{1,2\\}}$.", "\\{1,2\\}"),
        ("It is $\\boxed{\\text{even}}.$", "\\text{even}"),
        # Rare in MATH, but in it, and one such record must not make the whole file useless.
        ("So it is $\\boxed 2$.", "2"),
        ("It is $\\fbox{2}$.", "2"),
    ],
)
def test_math(written, solution, answer):
    problems = read_problems(written([math_record(), math_record("And?", solution)]))
    assert problems[1] == Problem("And?", answer, True)


@needs_math_verify
def test_both_kinds_in_one_file(written):
    problems = read_problems(written([gsm8k(), math500(), math_record(), gsm8k()]))
    assert [problem.latex for problem in problems] == [False, True, True, False]


@needs_math_verify
def test_a_record_with_an_empty_box_is_left_out(written):
    # The published training set has such.
    empty = math_record(solution="It is $\\boxed{}$.")
    assert len(read_problems(written([math_record(), empty, math_record()]))) == 2


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (tree_grpo, json.dumps([hotpot("Où?"), hotpot("Who?")], ensure_ascii=False)),
        (tree_grpo, lines([musique("Où?"), musique("Who?")]).replace("\\u00f9", "ù")),
        (treerl, json.dumps([gsm8k("Où?"), gsm8k("Who?")], ensure_ascii=False)),
        (treerl, lines([gsm8k("Où?"), gsm8k("Who?")]).replace("\\u00f9", "ù")),
    ],
)
def test_byte_order_mark_and_other_line_ends(tmp_path, script, text):
    path = tmp_path / "data"
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
def refusal(script, path) -> str:
    """The message with which a script turns a data file down: a line that names flag and file."""
    with pytest.raises(script.BadInput) as caught:
        READ[script](str(path))
    message = str(caught.value)
    assert message.startswith(f"--data {path}")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("script", "records"),
    [
        (tree_grpo, [hotpot(), hotpot("Is B [a] {town}?", "yes")]),
        (treerl, [gsm8k(), gsm8k("Is it [1] {or} 2?")]),
    ],
)
def test_a_list_cut_anywhere_is_refused_with_its_last_line(tmp_path, script, records, indent):
    # A download that broke off may end inside a word, after a bracket, or between two records.
    path = tmp_path / "cut.json"
    whole = json.dumps(records, indent=indent)
    for length in range(1, len(whole)):
        path.write_text(whole[:length])
        last = 1 + whole[:length].rstrip().count("\n")
        assert f"{path}, line {last}: " in refusal(script, path)


@pytest.mark.parametrize(
    ("script", "record"),
    [(tree_grpo, musique()), (treerl, gsm8k()), (treerl, math500()), (treerl, math_record())],
)
def test_a_line_cut_anywhere_is_refused_with_its_number(tmp_path, script, record):
    path = tmp_path / "cut.jsonl"
    good = lines([record] * 2)
    last = json.dumps(record)
    for length in range(1, len(last)):
        path.write_text(good + last[:length])
        assert f"{path}, line 3: " in refusal(script, path)
    # A broken line may be in the middle; a reader of JSON may notice it at the line's end.
    path.write_text(good + last[:40] + "\n" + last)
    assert re.search(r", line [34]: ", refusal(script, path))


CAPITAL = {"Question": "Where?", "Answer": "5"}


@pytest.mark.parametrize(
    ("script", "record", "without"),
    [
        (tree_grpo, hotpot(), ["question"]),
        (tree_grpo, hotpot(), ["answer"]),
        (tree_grpo, hotpot(), ["context"]),
        (tree_grpo, musique(), ["question"]),
        (tree_grpo, musique(), ["answer"]),
        (tree_grpo, musique(), ["paragraphs"]),
        (treerl, gsm8k(), ["question"]),
        (treerl, gsm8k(), ["answer"]),
        (treerl, math500(), ["problem"]),
        (treerl, math500(), ["answer", "solution"]),
        (treerl, math_record(), ["problem"]),
        (treerl, math_record(), ["solution"]),
        (treerl, CAPITAL, ["Question"]),
        (treerl, CAPITAL, ["Answer"]),
    ],
)
def test_a_record_without_a_field(tmp_path, script, record, without):
    path = tmp_path / "data.json"
    broken = {name: value for name, value in record.items() if name not in without}
    text = json.dumps([record, record, broken, record], indent=4)
    path.write_text(text)
    # A record of this list begins with a "{" alone in its line; the third is the broken one.
    begins = [i for i, line in enumerate(text.splitlines(), 1) if line == "    {"]
    assert f"{path}, line {begins[2]}: " in refusal(script, path)
    path.write_text(lines([record, broken, record]))
    assert f"{path}, line 2: " in refusal(script, path)


# HotpotQA's shape, with a number for an answer, but not where GSM8K has it.
COUNTED = hotpot("How many books has Ann?", "42")
USELESS = [
    *[gsm8k(None), gsm8k(7), gsm8k(["How many?"]), gsm8k(""), gsm8k(" \n")],
    *[gsm8k(answer=None), gsm8k(answer=42), gsm8k(answer=["#### 42"]), gsm8k(answer="")],
    *[gsm8k(answer="It is 42."), gsm8k(answer="#### "), gsm8k(answer="#### many")],
    *[gsm8k(answer="#### 3 or 4"), gsm8k(answer="#### 1/0"), gsm8k(answer="42\n####\n42")],
    *[math500(None), math500(7), math500(" ")],
    *[math500(answer=5), math500(answer=["5"]), math500(answer=" ")],
    *[math_record(solution=None), math_record(solution="It is 2.")],
    *[math_record(solution="\\boxed{2"), math_record(solution="#### 2")],
    *[COUNTED, None, 7, "question", ["question", "answer"]],
]


@pytest.mark.parametrize("broken", USELESS, ids=lambda record: json.dumps(record)[-40:])
def test_a_record_with_a_field_of_no_use(tmp_path, broken):
    path = tmp_path / "data.jsonl"
    path.write_text(lines([gsm8k(), broken, gsm8k()]))
    message = refusal(treerl, path)
    assert f"{path}, line 2: " in message
    assert "GSM8K" in message
    assert "MATH" in message


FOREIGN = {
    "dict": '{"version": "1.1", "data": []}',
    "numbers": "[1, 2, 3]",
    "number": "7",
    "word": '"question"',
    "null": "[null]",
    "lists": '[["question", "answer"]]',
    "prose": "Who wrote A?\nAnn.\n",
    "csv": "question,answer\nWho,Ann\n",
    "too deep": "[" * 100_000,
    "huge number": "[" + "9" * 10_000 + "]",
    "zeros": "\0" * 1000,  # what a crashed download may leave: valid UTF-8, but nothing else
    "squad": json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": []}]}),
    "chat": lines([{"messages": [{"role": "user", "content": "2 + 2?"}]}] * 3),
}
NOT_QUESTIONS = {
    "gsm8k": lines([gsm8k()] * 3),
    "gsm8k in a list": json.dumps([gsm8k()] * 3),
    "answer is null": json.dumps([hotpot(answer=None)]),
    "question is a number": json.dumps([hotpot(7)]),
    "no passages": lines([{**musique(), "paragraphs": []}]),
    "context is text": json.dumps([hotpot(context="A B")]),
    "paragraphs without text": lines([{**musique(), "paragraphs": [{"title": "A"}]}]),
    "sentences are numbers": json.dumps([hotpot(context=[["A", [1, 2]]])]),
}
NOT_PROBLEMS = {
    "hotpot": lines([COUNTED] * 3),
    "hotpot in a list": json.dumps([COUNTED] * 3),
}


@pytest.mark.parametrize(
    ("script", "text"),
    [
        *(pytest.param(tree_grpo, text, id=name) for name, text in NOT_QUESTIONS.items()),
        *(pytest.param(treerl, text, id=name) for name, text in NOT_PROBLEMS.items()),
        *(
            pytest.param(script, text, id=f"{script.__name__} {name}")
            for script in READ
            for name, text in FOREIGN.items()
        ),
    ],
)
def test_foreign_json(tmp_path, script, text):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    assert f"{path}, line 1: " in refusal(script, path)


@both_scripts
@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"[\n]\n", b"\xef\xbb\xbf"])
def test_files_without_records(tmp_path, script, content):
    path = tmp_path / "empty.json"
    path.write_bytes(content)
    assert "0 records" in refusal(script, path)


@pytest.mark.parametrize(
    ("script", "records", "of_use"),
    [
        (tree_grpo, [musique()], 1),
        (treerl, [gsm8k()], 1),
        (tree_grpo, [musique(answerable=False)] * 2, 0),
    ],
)
def test_one_to_train_on_and_one_to_hold_out_are_two(tmp_path, script, records, of_use):
    path = tmp_path / "few.jsonl"
    path.write_text(lines(records))
    assert f"{of_use} records" in refusal(script, path)


@both_scripts
def test_files_that_cannot_be_read(tmp_path, script):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    assert "not UTF-8" in refusal(script, picture)
    assert "No such file" in refusal(script, tmp_path / "missing.json")
    assert "directory" in refusal(script, tmp_path)


@pytest.mark.parametrize("record", [math500(), math_record(), CAPITAL])
def test_a_file_that_needs_a_package_that_is_missing(tmp_path, monkeypatch, record):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # an import of it fails from here on
    path = tmp_path / "math.jsonl"
    path.write_text(lines([record] * 3))
    assert "pip install math-verify" in refusal(treerl, path)
    with pytest.raises(treerl.BadInput):  # and so before anything is made
        treerl.main(["--data", str(path), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    path.write_text(lines([gsm8k()] * 3))
    assert len(read_problems(str(path))) == 3  # such answers are compared without it


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
    assert drawn.splitlines() == [
        "```mermaid",
        "flowchart TD",
        '    n0["Who?"]',
        "    style n0 fill:#fff,color:#000",
        '    n1["one two"]',
        "    style n1 fill:#cfc,color:#000",
        "    n0 -->|tree 1| n1",
        '    n2["three<br>R = 1"]',
        "    style n2 fill:#fcc,color:#000",
        "    n1 --> n2",
        '    n3["#60;b#62;<br>R = 0"]',
        "    style n3 fill:#eee,color:#000",
        "    n0 -->|tree 2| n3",
        "```",
    ]


def small_graph() -> list[Transition]:
    """s - m - G of a rollout that won, s - m and s - x of two that failed."""
    return [
        Transition("s", "to m", "m", 0),
        Transition("m", "to G", SUCCESS, 0),
        Transition("s", "to m", "m", 1),
        Transition("s", "to x", "x", 2),
    ]


def test_graph_as_mermaid():
    # d(m) = 1, d(s) = 2, and 3 for x, which has no way. Edges come by d(state) + d(next state):
    # m - G 1, s - m 3, s - x 5. The edge s - m was taken twice, with A = 1 and 0.5.
    drawn = graph_mermaid("do it", small_graph(), torch.tensor([1.0, 0.0, 0.5, -1.25]))
    assert drawn.splitlines() == [
        "```mermaid",
        "flowchart TD",
        '    task["Task: do it<br>3 of 3 edges"]',
        '    n0["m<br>d = 1"]',
        "    style n0 fill:#fff,color:#000",
        '    n1["SUCCESS<br>d = 0"]',
        "    style n1 fill:#cfc,color:#000",
        '    n2["s<br>d = 2"]',
        "    style n2 fill:#fff,color:#000",
        '    n3["x<br>d = 3"]',
        "    style n3 fill:#fff,color:#000",
        '    n0 -->|"to G, 1 x, A = +0.00"| n1',
        "    linkStyle 0 stroke:#888",
        '    n2 -->|"to m, 2 x, A = +0.75"| n0',
        "    linkStyle 1 stroke:#2a2",
        '    n2 -->|"to x, 1 x, A = -1.25"| n3',
        "    linkStyle 2 stroke:#c22",
        "```",
    ]


def test_of_a_large_graph_the_edges_nearest_to_success_are_drawn():
    few = graph_mermaid("do it", small_graph(), torch.zeros(4), most=2)
    assert "Task: do it<br>2 of 3 edges" in few
    assert few.count("-->") == 2
    assert '["x' not in few


def test_mermaid_of_strange_texts():
    strange = '"A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\n\nwhy)?'
    escaped = (
        "#34;A #60;b#62;#124;C#124;#60;/b#62;#34;; #35;1 #38; #91;x#93; #123;y#125; #96;z#96; "
        "#92; --#62; (and why)?"
    )
    long = "x" * 300
    transitions = [
        Transition(strange, strange, "SUCCESS", 0),
        Transition("SUCCESS", long, SUCCESS, 0, 0.5),
    ]
    text = graph_mermaid(strange, transitions, torch.zeros(2))
    assert f'["Task: {escaped}<br>' in text
    assert f'["{escaped}<br>d = 1.5"]' in text
    assert f'|"{escaped}, 1 x, A = +0.00"|' in text
    assert f'|"{long[:100]}, 1 x' in text
    # A state of that name is no success.
    assert text.count('["SUCCESS<br>') == 2
    assert text.count("#cfc") == 1


def test_pictures_have_no_control_characters():
    # With them git and editors would take the file for a binary one.
    words = "".join(map(chr, range(40)))
    tree = tree_grpo.mermaid([tree_grpo.Node()], [words], [""], [None])
    transitions = [Transition(words, words, SUCCESS, 0)]
    graph = graph_gpo.graph_mermaid(words, transitions, torch.zeros(1))
    for drawn in (tree, graph):
        assert "#0;" in drawn
        assert all(c >= " " for c in drawn.replace("\n", ""))
