"""tree_grpo.py seen from outside: data files, BM25, rewards, the search server, the command line, kill and resume."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import tree_grpo
from tree_grpo import BM25, Agent, Args, BadInput, ask_server, normalise, outcome_reward, read_questions

SCRIPT = Path(tree_grpo.__file__).resolve()
# One thread, because this many small runs on few cores wait for each other otherwise; no hub and no GPU, so that what
# the tests see does not depend on the machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


# ---------------------------------------------------------------------------------------------------------- data files
def hotpot(question="Who wrote A?", answer="Ann", context=None, **more):
    """A record in HotpotQA's published shape: sentences after a paragraph's first begin with a space."""
    context = context or [["A", ["A is a book.", " Ann wrote it."]], ["B", ["B is a town."]]]
    return {"_id": "5a7a06935542990198eaf050", "answer": answer, "question": question, "type": "bridge",
            "level": "medium", "supporting_facts": [["A", 1]], "context": context, **more}

def musique(question="Who wrote A?", answer="Ann", aliases=("Ann Smith", "A. Smith"), answerable=True, texts=None):
    """A record in MuSiQue's published shape."""
    texts = texts or {"A": "A is a book.", "B": "B is a town."}
    paragraphs = [{"idx": i, "title": title, "paragraph_text": text, "is_supporting": i == 0}
                  for i, (title, text) in enumerate(texts.items())]
    return {"id": "2hop__13548_13529", "paragraphs": paragraphs, "question": question, "question_decomposition": [],
            "answer": answer, "answer_aliases": list(aliases), "answerable": answerable}

def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)

def refusal(path):
    """The message with which read_questions turns a file down: one line that names the flag and the file."""
    with pytest.raises(BadInput) as caught:
        read_questions(str(path))
    message = str(caught.value)
    assert message.startswith(f"--data {path}") and "\n" not in message
    return message

@pytest.mark.parametrize("indent", [None, 1])
def test_hotpotqa(tmp_path, indent):
    path, other = tmp_path / "hotpot.json", [["C", ["C is a river."]], ["A", ["A is a book.", " Ann wrote it."]]]
    path.write_text(json.dumps([hotpot(), hotpot("What is C?", "a river", other)], indent=indent))
    first, second = read_questions(str(path))
    assert (first.text, first.answers) == ("Who wrote A?", ["Ann"])
    assert (second.text, second.answers) == ("What is C?", ["a river"])
    # A search looks into the passages of all questions, and a passage that two of them share is there once.
    assert first.passages is second.passages
    passages = [("A", "A is a book. Ann wrote it."), ("B", "B is a town."), ("C", "C is a river.")]
    assert first.passages.passages == passages

def test_2wikimultihopqa(tmp_path):
    # HotpotQA's shape with some fields more, one of them a list of triples, and sentences without spaces before them.
    path = tmp_path / "2wiki.json"
    record = hotpot(context=[["A", ["A is a book.", "Ann wrote it."]]], evidences=[["A", "author", "Ann"]])
    path.write_text(json.dumps([{**record, "type": "compositional"}] * 2))
    questions = read_questions(str(path))
    assert [(q.text, q.answers) for q in questions] == [("Who wrote A?", ["Ann"])] * 2
    assert questions[0].passages.passages == [("A", "A is a book. Ann wrote it.")]

def test_musique_keeps_aliases_and_leaves_out_the_unanswerable(tmp_path):
    path = tmp_path / "musique.jsonl"
    records = [musique(), musique("Who wrote C?", answerable=False), musique("Who?", "Bo", [], texts={"D": "Bo."})]
    path.write_text(lines(records))
    first, second = read_questions(str(path))
    assert (first.text, first.answers) == ("Who wrote A?", ["Ann", "Ann Smith", "A. Smith"])
    assert (second.text, second.answers) == ("Who?", ["Bo"])
    assert second.passages.passages == [("A", "A is a book."), ("B", "B is a town."), ("D", "Bo.")]

def test_a_file_of_unanswerable_questions_has_no_questions(tmp_path):
    path = tmp_path / "musique.jsonl"
    path.write_text(lines([musique(answerable=False)] * 2))
    assert re.search(r"\b(0|no) questions", refusal(path))

@pytest.mark.parametrize("text", [json.dumps([hotpot("Où?"), hotpot()], ensure_ascii=False),
                                  lines([musique("Où?"), musique()]).replace("\\u00f9", "ù")])
def test_byte_order_mark_and_other_line_ends(tmp_path, text):
    path = tmp_path / "data"
    path.write_bytes(b"\xef\xbb\xbf" + ("\n\n" + text + "\n \n").replace("\n", "\r\n").encode())
    assert [question.text for question in read_questions(str(path))] == ["Où?", "Who wrote A?"]

@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_cut_anywhere_is_refused_with_its_last_line(tmp_path, indent):
    # A download that broke off may end inside a word, after a bracket, or exactly between two records.
    path, whole = tmp_path / "cut.json", json.dumps([hotpot(), hotpot("Is B [a] {town}?", "yes")], indent=indent)
    for length in range(1, len(whole)):
        cut = whole[:length].rstrip()
        path.write_text(whole[:length])
        assert f"{path}, line {1 + cut.count(chr(10))}: " in refusal(path), f"cut to {length} characters"

def test_a_line_cut_anywhere_is_refused_with_its_number(tmp_path):
    path, first, last = tmp_path / "cut.jsonl", lines([musique()] * 2), json.dumps(musique())
    for length in range(1, len(last)):
        path.write_text(first + last[:length])
        assert f"{path}, line 3: " in refusal(path), f"cut to {length} characters"
    path.write_text(first + last[:40] + "\n" + last)  # a broken line in the middle
    assert re.search(r", line [34]: ", refusal(path))  # a reader of JSON may notice it at the line's end

@pytest.mark.parametrize("field", ["question", "answer", "context"])
def test_a_record_without_a_field_in_the_middle_of_a_list(tmp_path, field):
    path, broken = tmp_path / "hotpot.json", {name: v for name, v in hotpot("Which?").items() if name != field}
    text = json.dumps([hotpot(), hotpot(), broken, hotpot()], indent=4)
    path.write_text(text)
    # A record of this list begins with a "{" alone in its line; the third of them is the broken one.
    begins = [number for number, line in enumerate(text.splitlines(), 1) if line == "    {"]
    assert f"{path}, line {begins[2]}: " in refusal(path)

@pytest.mark.parametrize("field", ["question", "answer", "paragraphs"])
def test_a_record_without_a_field_in_the_middle_of_lines(tmp_path, field):
    path, broken = tmp_path / "musique.jsonl", {name: v for name, v in musique().items() if name != field}
    path.write_text(lines([musique(), broken, musique()]))
    assert f"{path}, line 2: " in refusal(path)

GSM8K = {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}
FOREIGN = {
    "dict": '{"version": "1.1", "data": []}', "numbers": "[1, 2, 3]", "number": "7", "word": '"question"',
    "null": "[null]", "lists": '[["question", "answer"]]',
    "gsm8k": lines([GSM8K] * 3), "gsm8k in a list": json.dumps([GSM8K] * 3),
    "answer is null": json.dumps([hotpot(answer=None)]), "question is a number": json.dumps([hotpot(7)]),
    "no passages": lines([{**musique(), "paragraphs": []}]), "context is text": json.dumps([hotpot(context="A B")]),
    "paragraphs without text": lines([{**musique(), "paragraphs": [{"title": "A"}]}]),
    "sentences are numbers": json.dumps([hotpot(context=[["A", [1, 2]]])]), "prose": "Who wrote A?\nAnn.\n",
    "csv": "question,answer\nWho,Ann\n", "too deep": "[" * 100_000, "huge number": "[" + "9" * 10_000 + "]",
}

@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_json(tmp_path, name):
    path = tmp_path / "foreign.json"
    path.write_text(FOREIGN[name])
    assert f"{path}, line 1: " in refusal(path)

@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"[\n]\n", b"\xef\xbb\xbf"])
def test_files_without_questions(tmp_path, content):
    path = tmp_path / "empty.json"
    path.write_bytes(content)
    assert re.search(r"\b(0|no) questions", refusal(path))

def test_files_that_cannot_be_read(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    assert "not UTF-8" in refusal(picture)
    assert "No such file" in refusal(tmp_path / "missing.json")
    assert "directory" in refusal(tmp_path)
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(1000))  # what a crashed download may leave: valid UTF-8, but nothing else
    assert f"{zeros}, line 1: " in refusal(zeros)

def test_half_a_surrogate_pair_does_not_get_to_the_tokenizer():
    # JSON can spell half of a pair, \ud83d, which is no character: a tokenizer raises TypeError on a text that has it.
    agent = object.__new__(Agent)
    agent.tokenizer = lambda text, add_special_tokens: {"input_ids": list(text.encode())}
    assert bytes(agent.encode(json.loads('"half \\ud83d of one"'))).decode() == "half ? of one"


# ---------------------------------------------------------------------------------------------------------------- BM25
# Four passages of 4, 2, 6 and 4 words, titles included, so 4 on average. With k1 = 1.2 and b = 0.75 a word that
# occurs n times adds rarity * 2.2 n / (n + s), where s = 1.2 (0.25 + 0.75 words / 4): 1.2, 0.75, 1.65 and 1.2.
# Rarity is ln(1 + (4 - d + 0.5) / (d + 0.5)) of a word in d passages: ln 2 = 0.693 for two, ln(10/3) = 1.204 for one.
ROME, OSLO = ("Rome", "river, river, bank"), ("Oslo", "River")
LIMA, CAIRO = ("Lima", "bank of the old city"), ("Cairo", "a desert city")

@pytest.mark.parametrize("query, best", [
    # "river": Rome 0.693 * 4.4 / 3.2 = 0.953, Oslo 0.693 * 2.2 / 1.75 = 0.871
    # "bank":  Rome 0.693 * 2.2 / 2.2 = 0.693, Lima 0.693 * 2.2 / 2.65 = 0.575
    ("River", [ROME, OSLO]),
    ("bank", [ROME, LIMA]),
    ("the river bank", [ROME, LIMA, OSLO]),  # Rome 1.646, Lima 0.575 + 0.999 for "the", Oslo 0.871
    ("river bank", [ROME, OSLO, LIMA]),  # Rome 1.646, Oslo 0.871, Lima 0.575
    ("desert river", [CAIRO, ROME, OSLO]),  # Cairo 1.204 * 2.2 / 2.2 = 1.204: a rare word beats a common one twice
    ("bank, bank, BANK desert", [CAIRO, ROME, LIMA]),  # 1.204, 0.693, 0.575: a word of the query counts once
    ("oslo", [OSLO]),  # a title counts
    ("riverbank", []), ("", []), ("?!", []),  # no common word, no passage
])
def test_bm25_by_hand(query, best):
    index = BM25([CAIRO, LIMA, OSLO, ROME])
    assert index.top(query, 9) == best  # 9 is more than there are
    assert index.top(query, 1) == best[:1]
    assert index.top(query, 2) == best[:2]

def test_bm25_of_empty_passages():
    assert BM25([("", ""), ("", "")]).top("river", 3) == []


# -------------------------------------------------------------------------------------------------------------- reward
@pytest.mark.parametrize("text, normal", [
    ("The  Eiffel Tower!", "eiffel tower"), ("an A.B.C. of the\tU.S.\n", "abc of us"),
    ("Theodore an Ananas", "theodore ananas"), ("Jean-Luc's", "jeanlucs"), ("Ångström", "ångström"),
    ("a", ""), ("", ""), ("1,000", "1000"), ("$5 (five)", "5 five"),
])
def test_normalise(text, normal):
    assert normalise(text) == normal

def search(query="mayor of Paris", think="I look it up."):
    return f"<think>{think}</think><search>{query}</search>"

def answer(words="Paris", think="I know."):
    return f"<think>{think}</think><answer>{words}</answer>"

@pytest.mark.parametrize("reward, turns, answers", [
    # A match in a well-formed trajectory.
    (1.0, [answer()], ["Paris"]),
    (1.0, [search(), answer()], ["Paris"]),
    (1.0, [search(), search(), search(), answer()], ["Paris"]),
    (1.0, ["\n<think>\na\nb </think>\n\n <search> q\n</search>\n", answer("\n Paris\n", "") + " \n"], ["Paris"]),
    (1.0, [answer("the Beatles!")], ["Beatles"]),
    (1.0, [answer("BEATLES")], ["The Beatles"]),
    (1.0, [answer(" New York City ")], ["NYC", "New York", "New York City"]),
    (1.0, [answer("a < b")], ["a < b"]),
    # A match in a malformed one: a thought is missing, at the end or on the way.
    (0.8, ["<answer>Paris</answer>"], ["Paris"]),
    (0.8, [search(), "<answer>the paris.</answer>"], ["Paris"]),
    (0.8, ["<search>mayor</search>", answer()], ["Paris"]),
    # Words outside the tags, a thought that is not closed, two thoughts, the thought after the action.
    (0.8, ["Well, " + answer()], ["Paris"]),
    (0.8, [answer() + " That is it."], ["Paris"]),
    (0.8, ["<think>Hm <answer>Paris</answer>"], ["Paris"]),
    (0.8, ["<think>a</think>" + answer()], ["Paris"]),
    (0.8, ["<answer>Paris</answer><think>a</think>"], ["Paris"]),
    # Two actions in a turn, of which the first counts; an action inside a thought; results that the policy made up.
    (0.8, [answer() + "<search>q</search>"], ["Paris"]),
    (0.8, [search() + "<search>q</search>", answer()], ["Paris"]),
    (0.8, ["<think>I <search>q</search></think><search>q</search>", answer()], ["Paris"]),
    (0.8, [search() + "<information>It is Paris.</information>", answer()], ["Paris"]),
    # A turn that was spent without an action.
    (0.8, ["<think>Hm.</think>", answer()], ["Paris"]),
    (0.8, ["", answer()], ["Paris"]),
    # An episode ends at its answer, so play() never makes this one; by the rule it is malformed, its last turn counts.
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
    (0.0, [search() + "<answer>Paris</answer>"], ["Paris"]),  # its search came first, and was its action
])
def test_outcome_reward(reward, turns, answers):
    assert outcome_reward(turns, answers) == reward


# ------------------------------------------------------------------------------------------------------- search server
def send(handler, content, status=200):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)

def hit(contents, score=0.5):
    return {"document": {"id": "7", "contents": contents}, "score": score}

@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a real server; reply(handler, number) answers its number-th POST. Returns the URL and the
    list, still growing, of what was posted."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        posted = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                try:
                    reply(self, len(posted))
                except OSError:  # the client has hung up, as it should where an answer is too long or too slow
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

def test_all_queries_go_in_one_request(serve):
    found = [[hit('"Rome"\nIt is the capital\nof Italy.'), hit('"Oslo"\nIt is in Norway.'), hit('"Lima"\nToo many.')],
             [],
             [hit("a passage without a title")]]
    url, posted = serve(lambda handler, number: send(handler, {"result": found}))
    agent = object.__new__(Agent)  # of an agent a search needs nothing but its arguments
    agent.args = Args(search_url=url, topk=2)
    observations = agent.search([(None, "capital of Italy"), (None, 'a "quoted" one'), (None, "trois é")])
    assert re.search(r"Rome.*It is the capital\nof Italy\..*Oslo.*It is in Norway\.", observations[0], re.DOTALL)
    assert "Lima" not in observations[0]  # the server sent one more than topk
    assert observations[1:] == ["nothing found", "a passage without a title"]
    queries = ["capital of Italy", 'a "quoted" one', "trois é"]
    assert posted == [("/retrieve", {"queries": queries, "topk": 2, "return_scores": True})]
    assert agent.search([]) == [] and len(posted) == 1  # nothing to ask, no request

def assert_failed(observations, number):
    assert len(observations) == number
    assert all(isinstance(text, str) and "fail" in text for text in observations), observations

GOOD = {"result": [[hit('"Rome"\nA city.')]] * 3}
WRONG = {  # answers to three queries
    "not JSON": b"<html>busy</html>", "nothing": b"", "half of an answer": json.dumps(GOOD).encode()[:-9],
    "not text": b"\xff\xfe\x00" * 9, "a list": [], "null": None, "a number": 7,
    "an error": {"detail": "no index loaded"}, "null for the result": {"result": None},
    "a dict for the result": {"result": {"0": [hit("a")]}}, "one list for all": {"result": [hit("a")] * 3},
    "null for a query": {"result": [[hit("a")], None, [hit("a")]]},
    "hits without document": {"result": [[{"contents": "a"}]] * 3}, "contents are null": {"result": [[hit(None)]] * 3},
    "contents are a list": {"result": [[hit(["a", "b"])]] * 3},
    "documents are text": {"result": [[{"document": "a"}]] * 3},
    "one result too few": {"result": GOOD["result"][:2]}, "no results": {"result": []}, "too deep": b"[" * 50_000,
}

@pytest.mark.parametrize("name", WRONG)
def test_a_server_that_answers_nonsense(serve, name):
    url, posted = serve(lambda handler, number: send(handler, WRONG[name]))
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=5, tries=1), 3)
    assert len(posted) == 1

def drip(handler, part, seconds=4.0):
    """Bytes that change nothing, one every 50 ms: each comes long before a timeout that starts anew with each."""
    for _ in range(int(seconds / 0.05)):
        handler.wfile.write(part)
        handler.wfile.flush()
        time.sleep(0.05)

def drip_body(handler, number):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    drip(handler, b" ")
    handler.wfile.write(json.dumps(GOOD).encode())

def hang(handler, number):
    time.sleep(4)
    send(handler, GOOD)

def ten_megabytes(handler, number):  # of the right shape, so nothing is wrong with it but its size
    send(handler, {"result": [[hit("x" * 10_000_000)]] * 3})

@pytest.mark.parametrize("reply", [drip_body, hang, ten_megabytes])
def test_a_server_that_is_slow_or_talks_too_much(serve, reply):
    url, posted = serve(reply)
    began = time.monotonic()
    assert_failed(ask_server(url, ["a", "b", "c"], 3, timeout=0.4 if reply is not ten_megabytes else 5, tries=1), 3)
    assert time.monotonic() - began < 3, "a server must not hold up the run for longer than about its timeout"
    assert len(posted) == 1

def test_a_server_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:  # bound but not listening, so it refuses, and nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        assert_failed(ask_server(f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve", ["a", "b"], 3, 2, tries=1), 2)
    assert "refused" in capsys.readouterr().err  # the reason is for the user, not for the policy

@pytest.mark.parametrize("url", ["127.0.0.1:8000/retrieve", "localhost", "retrieve", "http://[::1", "http://a b/"])
def test_an_address_that_is_none(url):
    assert_failed(ask_server(url, ["a", "b"], 3, timeout=2, tries=1), 2)

def test_a_server_that_fails_each_time_and_one_that_recovers(serve):
    url, posted = serve(lambda handler, number: send(handler, b"oops", 500))
    assert_failed(ask_server(url, ["a", "b"], 3, timeout=5, tries=2), 2)
    assert len(posted) == 2

    def recover(handler, number):
        send(handler, *((b"oops", 500) if number == 1 else (GOOD,)))

    url, posted = serve(recover)
    observations = ask_server(url, ["a", "b", "c"], 3, timeout=5, tries=2)
    assert len(observations) == 3 and all("Rome" in text and "A city." in text for text in observations)
    assert len(posted) == 2 and posted[0] == posted[1]

def test_a_server_that_hangs_up(serve):
    url, _ = serve(lambda handler, number: handler.connection.shutdown(socket.SHUT_RDWR))
    assert_failed(ask_server(url, ["a"], 3, timeout=5, tries=1), 1)

# -------------------------------------------------------------------------------------------------------- command line
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NASTY = 'Who wrote "A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\nwhy)?'  # what means something in Mermaid or Markdown
KEYS = {"event", "step", "reward", "success", "generated_tokens", "forwarded_tokens", "tool_calls", "loss", "kl",
        "entropy", "grad_norm", "seconds"}
# Just enough supervised steps that some leaves earn more than others: without that all advantages and gradients are 0.
SMALL = ["--sft-steps", "20", "--prompts", "2", "--eval-prompts", "4", "--turn-tokens", "16", "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.003", "--warmup", "2"]

def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=99)

def ran(folder, *arguments):
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result

def metrics(out, event=None):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]

def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

def draw_tree(out):
    """tree.md as (labels by node, edges), after a check that every line of it is Mermaid."""
    first, second, *body, last = (out / "tree.md").read_text().splitlines()
    assert (first, second, last) == ("```mermaid", "flowchart TD", "```")
    labels, edges, styles = {}, [], []
    for line in body:
        if node := re.fullmatch(r'    n(\d+)\["([^"`<>\[\]{}|]*(<br>R = [^"`<>]*)?)"\]', line):
            labels[int(node[1])] = node[2]
        elif edge := re.fullmatch(r"    n(\d+) -->(?:\|tree \d+\|)? n(\d+)", line):
            edges.append((int(edge[1]), int(edge[2])))
        else:
            style = re.fullmatch(r"    style n(\d+) fill:#(?:[0-9a-f]{3}){1,2},color:#000", line)
            assert style, line
            styles.append(int(style[1]))
    # A tree: the prompt is n0, every other node has one parent, and that was drawn before it.
    assert sorted(labels) == sorted(styles) == list(range(len(labels)))
    assert sorted(child for _, child in edges) == list(range(1, len(labels)))
    assert all(parent < child for parent, child in edges)
    leaves = set(labels) - {parent for parent, _ in edges}
    assert all(("R = " in label) == (node in leaves) for node, label in labels.items())
    return labels, edges, leaves

def make_qwen3(folder, context, template=TEMPLATE):
    """A Qwen3 of a few thousand parameters with random weights, its tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"],
                                  show_progress=False)
    bpe.train_from_iterator([tree_grpo.INSTRUCTION], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=context, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer

# One process imports torch and transformers, once, and runs the script from its first line in a copy of itself for each
# case, without tearing that down in good order: hundredths of a second, where a new interpreter takes seconds.
FORKING = """
import json, os, runpy, signal, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM
for line in sys.stdin:
    script, cwd, output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.chdir(cwd)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [script, *arguments]
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        def quick_run(folder, *arguments):
            output = tmp_path_factory.mktemp("output")
            parent.stdin.write(json.dumps([str(SCRIPT), str(folder), str(output), arguments]) + "\n")
            parent.stdin.flush()
            status = int(parent.stdout.readline())
            stdout, stderr = ((output / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess(arguments, status, stdout, stderr)

        yield quick_run
        parent.stdin.close()

@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of data files and models, good and bad, that many tests use and none changes."""
    folder = tmp_path_factory.mktemp("files")
    good = json.dumps([hotpot(f"{NASTY} {i}") for i in range(6)], indent=1)
    (folder / "hotpot.json").write_text(good)
    (folder / "empty.json").write_text("")
    (folder / "cut.json").write_text(good[: len(good) // 2])
    (folder / "foreign.jsonl").write_text(lines([GSM8K] * 3))
    (folder / "one.jsonl").write_text(lines([musique()]))
    model, tokenizer = make_qwen3(folder / "qwen3", 2048)
    make_qwen3(folder / "short", 64)
    tokenizer.save_pretrained(folder / "no-weights")
    model.config.save_pretrained(folder / "no-weights")
    shutil.copytree(folder / "no-weights", folder / "no-tokenizer")
    model.save_pretrained(folder / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no-tokenizer" / name).unlink()
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16))
    gpt2.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder

@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of five steps of the built-in task that nobody interrupts: (its folder, the finished process)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", ran(folder, *SMALL, *FIVE, "--out", "out")

def test_built_in_run_leaves_its_metrics(whole):
    out, _ = whole
    rows, evals, steps = metrics(out), metrics(out, "eval"), metrics(out, "train")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert all(KEYS <= set(row) for row in steps)
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if name != "event")
    assert [row["step"] for row in evals] == [0, 5]  # before and after training
    assert all({"event", "step", "success", "greedy_success"} <= set(row) for row in evals)
    assert all(0 <= row["success"] <= 1 and 0 <= row["greedy_success"] <= 1 for row in evals)
    assert rows[0] == evals[0] and rows[-1] == evals[1]
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps[1:]) and steps[-1]["kl"] > 0
    assert len({row["loss"] for row in steps[1:]}) == 4

def test_built_in_run_draws_a_tree(whole):
    labels, _, leaves = draw_tree(whole[0])
    assert re.match(r"(Who|Where) is the .* of \w+\?$", labels[0])
    assert len(leaves) == 2 * (1 + 2)  # M (1 + N L)
    assert all(re.search(r"<br>R = (0|0\.1|0\.2|0\.8|1), A = [+-]\d\.\d\d$", labels[leaf]) for leaf in leaves)

def test_built_in_run_ends_with_a_summary(whole):
    out, process = whole
    assert "held-out success" in process.stdout and str(Path("out") / "final") in process.stdout
    before, after = metrics(out, "eval")
    for word, name in (("sampled", "success"), ("greedy", "greedy_success")):
        line = next(line for line in process.stdout.splitlines() if line.startswith(word))
        assert line.split()[-2:] == [f"{before[name]:.3f}", f"{after[name]:.3f}"]
    for name in ("generated_tokens", "forwarded_tokens", "tool_calls"):
        assert f"{sum(row[name] for row in metrics(out, 'train')):,} {name.replace('_', ' ')}" in process.stdout
    assert "training" in process.stderr and "Traceback" not in process.stderr

def test_built_in_run_leaves_a_model_for_transformers(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = whole
    model, tokenizer = (auto.from_pretrained(out / "final") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert 200_000 < model.num_parameters() < 1_000_000 and model.dtype == torch.float32
    ids = tokenizer("Who is the mayor of the birthplace of Ada?", return_tensors="pt")
    assert len(ids["input_ids"][0]) < 15  # its own words are whole tokens
    assert model(**ids).logits.isfinite().all()
    start, final = weights(out / "start"), weights(out / "final")
    assert start.keys() == final.keys() and not all(torch.equal(start[name], final[name]) for name in start)
    assert not (out / "checkpoint.tmp").exists() and len(list(out.glob("checkpoint-*"))) == 1

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    # The warm-started model of the built-in run, given by --model, takes the same first step; and activations that are
    # computed again in the backward pass are the same activations.
    out, _ = whole
    arguments = [*SMALL, *FIVE, "--steps", "1", "--model", str(out / "start"), "--grad-checkpointing", "--out", "out"]
    assert quick_run(tmp_path, *arguments).returncode == 0
    (before, step, _), (was_before, was, *_) = metrics(tmp_path / "out"), metrics(out)
    assert before == was_before
    assert step.keys() == was.keys()
    for name in step.keys() - {"event", "seconds"}:
        assert step[name] == pytest.approx(was[name], rel=1e-4, abs=1e-7), name
    assert not (tmp_path / "out" / "start").exists()  # nothing was warm-started

def test_chains_in_bfloat16_on_the_late_task_without_a_reference(quick_run, tmp_path):
    arguments = [*SMALL, "--prompts", "4", "--method", "grpo", "--M", "3", "--dtype", "bfloat16", "--hard", "late"]
    assert quick_run(tmp_path, *arguments, "--kl-coef", "0", "--steps", "2").returncode == 0
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("tree_grpo-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [0, 0] and any(row["grad_norm"] > 0 for row in steps)
    assert max(row["sampler_gap"] for row in steps) > 1e-5  # float32 is below: the forward passes were in bfloat16 ...
    assert all(tensor.dtype == torch.float32 for tensor in weights(out / "final").values())  # ... the weights were not
    _, edges, leaves = draw_tree(out)
    parents = [parent for parent, _ in edges]
    assert len(leaves) == 3 and parents.count(0) == 3  # three chains, which meet in the prompt ...
    assert all(parents.count(node) == 1 for node in set(parents) - {0})  # ... and nowhere else

def test_a_qwen3_with_a_chat_template_on_hotpotqa(files, tmp_path):
    arguments = ["--model", files / "qwen3", "--data", files / "hotpot.json", "--steps", 1, "--prompts", 2]
    process = ran(tmp_path, *arguments, "--eval-prompts", 2, "--max-turns", 2, "--turn-tokens", 8, "--out", "out")
    (step,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert KEYS <= set(step) and step["generated_tokens"] > 0 and step["lr"] == pytest.approx(1e-7)  # 1e-6 in 10 steps
    assert [row["step"] for row in evals] == [0, 1] and "held-out success" in process.stdout
    labels, _, leaves = draw_tree(tmp_path / "out")
    assert len(leaves) == 6 and "wrote" in labels[0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")
    assert tokenizer.chat_template == TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").config.model_type == "qwen3"

@pytest.mark.parametrize("lr", ["1e3", "1e10"])
def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path, lr):
    # After a first step of this size no number is finite: with the first rate not the gradients of the second step,
    # with the second rate not even the probabilities to draw from.
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", lr, "--model", str(whole[0] / "start")]
    result = quick_run(tmp_path, *arguments, "--out", "out")
    assert result.returncode not in (0, 2) and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "stopped before the step" in result.stderr.splitlines()[-1] and "--lr" in result.stderr.splitlines()[-1]
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1]
    assert list((tmp_path / "out").glob("checkpoint-*/state.pt")) and not (tmp_path / "out" / "final").exists()

def test_the_chat_template_makes_the_prompt(files):
    model, tokenizer = tree_grpo.load_model(str(files / "qwen3"), torch.device("cpu"))
    args = Args(data=str(files / "hotpot.json"), max_turns=3)
    question = read_questions(args.data)[0]
    agent = Agent(model, tokenizer, args, [], [])
    prompt = tokenizer.decode(agent.root(question).tokens)
    assert prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert question.text in prompt and "<search>" in prompt and "3 turns" in prompt


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def begin(folder, *arguments):
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=folder, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def wait_for_step(process, out, step):
    """Return as soon as metrics.jsonl has the row of that training step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
        if re.search(rf'"train".*"step": {step}\b', text):
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no row of step {step}: {process.communicate()[1][-3000:]}")

def assert_same_run(out, whole):
    """Everything equal but the time it took: rows, final weights bit for bit, the last tree."""
    rows, expected = ([{**row, "seconds": None} for row in metrics(folder)] for folder in (out, whole))
    assert rows == expected
    ours, theirs = weights(out / "final"), weights(whole / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "tree.md").read_text() == (whole / "tree.md").read_text()
    assert [folder.name for folder in out.glob("checkpoint*")] == [folder.name for folder in whole.glob("checkpoint*")]

def test_a_killed_run_that_is_resumed_equals_one_that_was_not(whole, tmp_path):
    out = tmp_path / "out"
    process = begin(tmp_path, *SMALL, *FIVE, "--out", "out")
    wait_for_step(process, out, 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "final").exists()
    # It may also die while it writes: half a line of metrics, half a checkpoint, half of what replaces the metrics.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 4, "rew')
    (out / "checkpoint.tmp").mkdir(exist_ok=True)
    (out / "checkpoint.tmp" / "state.pt").write_bytes(b"half")
    (out / "metrics.tmp").write_text('{"event": "ev')
    resumed = ran(tmp_path, "--resume", "out")
    assert "warm start" not in resumed.stderr
    assert_same_run(out, whole[0])
    assert not (out / "metrics.tmp").exists()

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(whole, tmp_path):
    out = tmp_path / "out"
    # It would save at every hundredth step, so what it has saved is Ctrl-C's doing.
    process = begin(tmp_path, *SMALL, *FIVE, "--save-every", "100", "--out", "out")
    wait_for_step(process, out, 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "stopped after step" in errors and "--resume out" in errors  # what happened and what to do next
    (checkpoint,) = out.glob("checkpoint-*")
    steps = [row["step"] for row in metrics(out, "train")]
    assert steps[-1] in (2, 3, 4) and checkpoint.name == f"checkpoint-{steps[-1]:06d}" and not (out / "final").exists()
    ran(tmp_path, "--resume", "out")
    assert_same_run(out, whole[0])


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.fixture(scope="session")
def runs(whole, tmp_path_factory):
    """Folders for --resume, one good and several that cannot be continued."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(whole[0], folder / "good")
    (folder / "nothing").mkdir()
    (checkpoint,) = whole[0].glob("checkpoint-*")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    contents = {"other-script": {**state, "script": "treerl.py"}, "other-file": {"weights": torch.ones(2)}}
    (folder / "no-state" / checkpoint.name).mkdir(parents=True)
    for name, content in contents.items():
        (folder / name / checkpoint.name).mkdir(parents=True)
        torch.save(content, folder / name / checkpoint.name / "state.pt")
    for name, damaged in {"cut-state": "state.pt", "cut-weights": "model.safetensors"}.items():
        shutil.copytree(whole[0], folder / name)
        path = folder / name / checkpoint.name / damaged
        path.write_bytes(path.read_bytes()[:1000])
    return folder

def snapshot(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.stat().st_size) for path in paths}

def assert_refused(result, flag):
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    assert flag in result.stderr and result.stderr.startswith("tree_grpo.py: ")

NEEDS_NO_FILES = """
    --method ppo|--advantage none|--hard never|--dtype float16|--device tpu|--device cuda|--device cuda:7|--device meta
    --M 0|--M 1.5|--M two|--N -1|--L -1|--K 0|--steps -1|--prompts 0|--epochs 0|--max-turns 0|--turn-tokens 0|--topk 0
    --hops 1|--hops 5|--eval-prompts 0|--save-every 0|--micro-tokens 0|--seed -1|--clip-low -0.1|--clip-high nan
    --top-p 0|--top-p 1.5|--top-p nan|--temperature 0|--temperature -1|--kl-coef -1|--kl-coef inf
    --lr abc|--lr nan|--lr inf|--lr 0|--lr -0.001|--lr|--learning-rate 1|--step 3|--grad-checkpointing=yes
    --search-url http://127.0.0.1:8000/retrieve|--resume missing|--data missing.json
"""

@pytest.mark.parametrize("line", re.split(r"\||\n\s*", NEEDS_NO_FILES.strip()))
def test_bad_argument(quick_run, tmp_path, line):
    result = quick_run(tmp_path, *line.split())
    assert_refused(result, re.split("[ =]", line)[0])
    assert not snapshot(tmp_path)

@pytest.mark.parametrize("flag, line", [
    ("--data", "--data {files}/missing.json"), ("--data", "--data {files}/empty.json"), ("--data", "--data {files}"),
    ("--data", "--data {files}/cut.json --model {files}/qwen3"), ("--data", "--data {files}/foreign.jsonl"),
    ("--data", "--data {files}/qwen3/model.safetensors"), ("--data", "--data {files}/one.jsonl"),
    ("--model", "--model {files}/no-weights"), ("--model", "--model {files}/missing"), ("--model", "--model {files}"),
    ("--model", "--model {files}/no-tokenizer"), ("--model", "--model {files}/hotpot.json"),
    ("--model", "--model Qwen/Qwen2.5-of-nobody"), ("--model", "--model {files}/gpt2"),
    ("--model", "--model {files}/short --data {files}/hotpot.json"),
    ("--out", "--out {files}"), ("--out", "--out {files}/one.jsonl"), ("--out", "--out {files}/one.jsonl/below"),
    ("--resume", "--resume {runs}/nothing"), ("--resume", "--resume {runs}/no-state"),
    ("--resume", "--resume {runs}/missing"), ("--resume", "--resume {runs}/other-script"),
    ("--resume", "--resume {runs}/other-file"), ("--resume", "--resume {runs}/cut-state"),
    ("--resume", "--resume {runs}/cut-weights"),
    ("--lr", "--resume {runs}/good --lr 0.25"), ("--M", "--resume {runs}/good --M 7"),
    ("--seed", "--seed 1 --resume {runs}/good"), ("--kl-coef", "--resume {runs}/good --steps 9 --kl-coef 0"),
    ("--out", "--resume {runs}/good --out elsewhere"),
    ("--device", "--resume {runs}/good --device tpu"),
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    before = snapshot(files, runs)
    result = quick_run(tmp_path, *line.format(files=files, runs=runs).split())
    assert_refused(result, flag)
    assert not snapshot(tmp_path) and snapshot(files, runs) == before

def test_bad_data_is_named_with_its_line(quick_run, files, tmp_path):
    result = quick_run(tmp_path, "--data", str(files / "cut.json"))
    last = (files / "cut.json").read_text().count("\n") + 1
    assert f"--data {files / 'cut.json'}, line {last}: " in result.stderr

def test_a_process_of_its_own_is_as_quiet(files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    assert_refused(run(tmp_path, "--model", files / "no-weights"), "--model")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    code = ("import runpy, sys\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n"
            "    print('transformers' in sys.modules)")
    code = f"import sys; sys.argv[:] = [{str(SCRIPT)!r}, '--method', 'ppo']\n{code}"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stdout == "False\n" and "--method" in process.stderr
