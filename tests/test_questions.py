"""Questions of tree_grpo.py: the built-in ones, what a search finds in BM25 or at a server, and the
reward (data files: test_data.py)."""

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from facts import CITIES, Facts, make_question
from questions import Questions, normalise, outcome_reward
from retrieval import BM25, FAILED, TRIAL, SearchServer

import tree_grpo


# --------------------------------------------------------------------------- the built-in questions
def test_the_example_that_chat_models_read_is_not_held_out():
    [text] = re.findall("^Question: (Who.*)", Facts.instruction, re.MULTILINE)
    assert random.Random(text).random() >= 0.2  # as make_question decides
    turns = re.findall("<think>.*", Facts.instruction)
    assert outcome_reward(turns, ["Bob"]) == 1


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
        assert question.text.startswith("Where" if entity in CITIES else "Who")
        hops[len(question.relations)] += 1

        facts = [text.partition(" is ")[0] for _, text in question.passages.passages]
        assert len(set(facts)) == len(facts)  # no two are about the same
    assert set(hops) == {2, 3, 4}


def test_held_out_questions_are_not_trained_on():
    # From the same random numbers, which would give the same questions otherwise.
    held_out = {make_question(random.Random(seed), 4, True).text for seed in range(1000)}
    trained = {make_question(random.Random(seed), 4, False).text for seed in range(1000)}
    assert not held_out & trained


def test_the_task_of_the_built_in_questions():
    args = tree_grpo.Args(eval_prompts=30)
    task = Facts(args, "2")
    assert task.training == []
    assert [question.text for question in task.held_out] == [
        question.text for question in Facts(tree_grpo.Args(eval_prompts=30, seed=7), "2").held_out
    ]
    assert {len(question.relations) for question in task.held_out} == {2}
    one, other = task.draw(random.Random(1)), task.draw(random.Random(2))
    asked = [
        (question, f"{question.relations[0]} of {question.start}") for question in (one, other)
    ]
    for (question, query), found in zip(asked, task.search(asked)):
        assert found.startswith(f"the {query} is ")
        assert ("", found) in question.passages.passages  # each has its own
    assert task.reward(one, [f"<think>.</think><answer>{one.answers[0]}</answer>"]) == 1.0
    for hops in ("1", "5", "two", ""):
        with pytest.raises(ValueError, match="2, 3 or 4 hops"):
            Facts(args, hops)


def test_demonstrations_are_well_formed_and_mostly_wrong():
    task = Facts(tree_grpo.Args(eval_prompts=1), "4")
    rng = random.Random(3)
    rewards = Counter()
    for _ in range(500):
        question = task.draw(rng)
        turns = task.demonstrate(question, rng)
        rewards[task.reward(question, [text for text, _ in turns])] += 1
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


def about(queries):
    """Answers to queries, each with one hit."""
    return {"result": [[hit(f'"{query}"\nabout {query}')] for query in queries]}


ANSWERED = about(TRIAL)


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a real server. reply(handler, queries) answers a POST, but the first one,
    the trial at the start. Returns the URL and the list, still growing, of what was posted after
    the trial."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(reply=lambda handler, queries: send(handler, about(queries)), trial=ANSWERED):
        posted, tried = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    if tried:
                        posted.append((self.path, asked))
                        reply(self, asked["queries"])
                    else:
                        tried.append(asked)
                        send(self, trial)
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


@pytest.fixture
def no_pause(monkeypatch):  # between two tries
    monkeypatch.setattr("retrieval.time.sleep", lambda seconds: None)


def sizes(posted) -> list[int]:
    return [len(asked["queries"]) for _, asked in posted]


def test_what_is_asked_and_what_is_made_of_the_answer(serve):
    rome = hit('"Rome"\nIt is the capital\nof Italy.')
    found = [[rome, hit('"Oslo"\nIt is in Norway.'), hit('"Lima"\nToo many.')], []]
    found.append([hit("a passage without a title")])
    url, posted = serve(lambda handler, queries: send(handler, {"result": found}))
    server = SearchServer(url, topk=2, timeout=60)
    queries = ["capital of Italy", 'a "quoted" one', "trois é"]
    first = '"Rome": It is the capital\nof Italy.\n"Oslo": It is in Norway.'  # topk is 2
    assert server.ask(queries) == [first, "nothing found", "a passage without a title"]
    assert posted == [("/retrieve", {"queries": queries, "topk": 2, "return_scores": True})]
    assert server.ask([]) == []
    assert len(posted) == 1  # nothing to ask, no request


def test_requests_are_of_32_queries_at_most(serve):
    url, posted = serve()
    queries = [f"query {i}" for i in range(70)]
    assert SearchServer(url, 3, 60).ask(queries) == [f'"{q}": about {q}' for q in queries]
    assert sizes(posted) == [32, 32, 6]


def test_one_bad_query_spoils_one_observation(serve, no_pause, capsys):
    def reply(handler, queries):  # as a retriever does that raises on one of them
        send(handler, about(queries), 200 if all(queries) else 500)

    url, posted = serve(reply)
    server = SearchServer(url, 3, 60)
    found = server.ask(["a", "b", "", "d"])
    assert found == ['"a": about a', '"b": about b', FAILED, '"d": about d']
    # Three tries; the trial, which is answered; a and b; "" and d; the trial; ""; the trial; d.
    assert sizes(posted) == [4, 4, 4, 1, 2, 2, 1, 1, 1, 1]
    assert "1 of 4 searches failed (HTTPError: HTTP Error 500" in capsys.readouterr().err
    queries = [f"query {i}" if i % 50 != 17 else "" for i in range(100)]
    found = server.ask(queries)
    assert [i for i, text in enumerate(found) if text == FAILED] == [17, 67]


def test_a_server_that_recovers(serve, no_pause):
    def reply(handler, queries):
        send(handler, about(queries), 500 if len(posted) < 3 else 200)

    url, posted = serve(reply)
    assert SearchServer(url, 3, 60).ask(["a", "b"]) == ['"a": about a', '"b": about b']
    assert len(posted) == 3  # and not a fourth
    assert posted[0] == posted[1] == posted[2]


def test_a_server_that_is_gone_is_not_asked_on_and_on(serve, no_pause):
    up = False

    def reply(handler, queries):
        if up:
            send(handler, about(queries))
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)

    url, posted = serve(reply)
    server = SearchServer(url, 3, 60)
    queries = [f"query {i}" for i in range(384)]
    assert server.ask(queries) == [FAILED] * 384
    assert sizes(posted) == [32, 32, 32, 1]  # three tries and the trial
    assert server.ask(queries) == [FAILED] * 384
    assert sizes(posted) == [32, 32, 32, 1, 1]  # a trial only
    up = True
    assert FAILED not in server.ask(queries)
    assert sizes(posted) == [32, 32, 32, 1, 1, 1, *[32] * 12]


def test_a_server_that_answers_nothing_but_the_trial_does_not_take_forever(serve, no_pause):
    over = threading.Event()

    def reply(handler, queries):
        if queries == TRIAL or over.wait(60):
            send(handler, about(queries))

    url, _ = serve(reply)
    server = SearchServer(url, 3, timeout=0.1)
    began = time.monotonic()
    assert server.ask([f"query {i}" for i in range(64)]) == [FAILED] * 64
    # Two requests, and eight more, of 0.1 s. To ask for each query alone would take 13 s.
    assert time.monotonic() - began < 6
    over.set()


def test_an_answer_that_comes_in_drops_takes_no_longer_than_the_timeout(serve):
    def reply(handler, queries):
        handler.send_response(200)
        handler.end_headers()
        for letter in json.dumps(about(queries)) + " " * 300:
            handler.wfile.write(letter.encode())
            time.sleep(0.02)

    url, _ = serve(reply)
    server = SearchServer(url, 3, timeout=0.3)
    began = time.monotonic()
    assert server.answers(["a"]) is None
    assert time.monotonic() - began < 3  # and not 7 s


# fmt: off
NONSENSE = [  # answers to one query
    b"<html>busy</html>", b"", json.dumps(about("a")).encode()[:-9], b"\xff\xfe\x00" * 9,  # no JSON
    [], None, 7, {"detail": "no index loaded"},  # no results
    {"result": None}, {"result": {"0": [hit("a")]}}, {"result": [hit("a")]}, {"result": []},
    {"result": [None]}, {"result": [[{"contents": "a"}]]}, {"result": [[hit(None)]]},
    {"result": [[hit(["a", "b"])]]}, {"result": [[{"document": "a"}]]}, about("ab"),
    b"[" * 50_000, {"result": [[hit("x" * 10_000_000)]]},  # nothing is wrong but its size
]
# fmt: on


def test_a_server_that_answers_nonsense(serve, no_pause):
    for nonsense in NONSENSE:
        url, _ = serve(trial=nonsense)
        with pytest.raises(ValueError, match="--search-url http.* no search server answers"):
            SearchServer(url, 3, 60)
        url, posted = serve(lambda handler, queries: send(handler, nonsense))  # noqa: B023
        server = SearchServer(url, 3, 60)
        assert server.ask(["a"]) == [FAILED]
        assert sizes(posted) == [1, 1, 1, 1]  # three tries, and the trial


def test_nobody_at_the_address():
    with socket.socket() as taken:  # bound but not listening: it refuses, and nobody takes the port
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address in (f"http://127.0.0.1:{port}/retrieve", f"http://localhost:{port}"):
            with pytest.raises(ValueError, match=f"--search-url {address}: .*refused"):
                SearchServer(address, 3, 60)
        taken.listen()  # and now it accepts, but never answers
        with pytest.raises(ValueError, match="timed out"):
            SearchServer(f"http://127.0.0.1:{port}/retrieve", 3, 0.2)
    for address in ("127.0.0.1:8000/retrieve", "localhost", "http://[::1", "http://a b/", "http:"):
        with pytest.raises(ValueError, match="no search server answers"):
            SearchServer(address, 3, 60)


def test_a_proxy_is_for_other_machines(serve, monkeypatch):
    proxy, passed_on = serve()
    SearchServer(proxy, 3, 60)
    monkeypatch.setenv("http_proxy", proxy)
    far = SearchServer("http://search.example/retrieve", 3, 60)  # it is asked through the proxy
    assert far.ask(["a"]) == ['"a": about a']
    assert [path for path, _ in passed_on] == ["http://search.example/retrieve"] * 2
    for near in ("http://127.8.9.1:9/retrieve", "http://[::1]:9/retrieve"):  # where nobody is
        with pytest.raises(ValueError, match="no search server answers"):
            SearchServer(near, 3, 60)
    assert len(passed_on) == 2
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url, posted = serve()
    for host in ("127.0.0.1", "localhost", "LOCALHOST"):
        near = SearchServer(url.replace("127.0.0.1", host), 3, 60)
        assert near.ask(["a"]) == ['"a": about a']
        assert {path for path, _ in posted} == {"/retrieve"}


def test_questions_whose_passages_a_server_has(serve, tmp_path):
    path = tmp_path / "nq.jsonl"
    records = [{"question": f"Who {i}?", "golden_answers": ["Ann", "A. Smith"]} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, records)))
    url, posted = serve()
    args = tree_grpo.Args(data=str(path), search_url=url, search_timeout=60, topk=5)
    task = Questions(args)
    assert len(task.training) == 4
    assert task.held_out[0].answers == ["Ann", "A. Smith"]
    asked = [(question, f"{i} of them") for i, question in enumerate(task.training[:2])]
    assert task.search(asked) == ['"0 of them": about 0 of them', '"1 of them": about 1 of them']
    assert posted[0][1] == {"queries": ["0 of them", "1 of them"], "topk": 5, "return_scores": True}
    assert Questions(tree_grpo.Args(data=str(path), search_url=url)).topk == 3


def test_a_run_without_its_search_server_does_not_begin(tmp_path):
    path = tmp_path / "nq.jsonl"
    path.write_text('{"question": "Who?", "golden_answers": ["Ann"]}\n' * 2)
    url = "http://127.0.0.1:9/retrieve"
    argv = [
        "--model",
        "none",
        "--data",
        str(path),
        "--search-url",
        url,
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(tree_grpo.BadInput, match=f"--search-url {url}: .*refused") as caught:
        tree_grpo.main([*argv, "--device", "cpu"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


# -------------------------------------------------------------------------- the reward of Tree-GRPO
def search(query="mayor of Paris", think="I look it up."):
    return f"<think>{think}</think><search>{query}</search>"


def answer(words="Paris", think="I know."):
    return f"<think>{think}</think><answer>{words}</answer>"


# fmt: off
NORMAL = {
    "The  Eiffel Tower!": "eiffel tower", "an A.B.C. of the\tU.S.\n": "abc of us", "1,000": "1000",
    "Theodore an Ananas": "theodore ananas", "Jean-Luc's": "jeanlucs", "Ångström": "ångström",
    "$5 (five)": "5 five", "": "", " \n": "",
    # What would leave nothing is not done.
    "a": "a", "The The!": "the the", "the a.": "the a", "!!!": "!!!", " C++ ": "c", "+ -": "+ -",
    # Typographic dashes and quotes, and letters whose accents are characters of their own.
    "1914\u20131918": "19141918", "1914-1918": "19141918", "Jean\u2011Luc\u2019s": "jeanlucs",
    "\u201cEmma\u201d": "emma", "\u2018 The Hand \u2019": "hand", "\u2212 5": "5", "\u2014": "-",
    "Beyonce\u0301": "beyoncé", "A\u030angstro\u0308m": "ångström",
}
REWARDS = {  # of turns, and answers, if they are others than Paris
    1.0: [  # a match in a well-formed trajectory
        ([answer()],), ([search(), answer()],), ([search(), search(), search(), answer()],),
        (["\n<think>\na\nb </think>\n\n <search> q\n</search>\n", answer("\n Paris\n", "") + " "],),
        ([answer("the Beatles!")], "Beatles"), ([answer("BEATLES")], "The Beatles"),
        ([answer(" New York City ")], "NYC", "New York", "New York City"),
        ([answer("a < b")], "a < b"), ([answer("the 1914-18 war")], "The 1914\u201318 War"),
        ([answer("Beyonce\u0301")], "Beyoncé"), ([answer("Beyoncé")], "Beyonce\u0301"),
        ([answer("The The")], "The The"),
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
        ([answer("")], ""), ([answer(" ")], " ", ""), ([answer("the")], "The The"),
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
