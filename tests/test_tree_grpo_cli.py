"""tree_grpo.py seen from outside: data files, BM25, rewards, the search server, the command line, kill and resume."""

import functools
import json
import re
import shutil
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
    wait_for_step,
)

import tree_grpo
from tree_grpo import BM25, Agent, Args, ask_server, encode, normalise, outcome_reward, read_questions

SCRIPT = Script(tree_grpo)
refusal = functools.partial(SCRIPT.refusal, read_questions)


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
    assert re.search(r"\b(0|no) records", refusal(path))

@pytest.mark.parametrize("text", [json.dumps([hotpot("Où?"), hotpot()], ensure_ascii=False),
                                  lines([musique("Où?"), musique()]).replace("\\u00f9", "ù")])
def test_byte_order_mark_and_other_line_ends(tmp_path, text):
    path = tmp_path / "data"
    path.write_bytes(b"\xef\xbb\xbf" + ("\n\n" + text + "\n \n").replace("\n", "\r\n").encode())
    assert [question.text for question in read_questions(str(path))] == ["Où?", "Who wrote A?"]

@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_cut_anywhere_is_refused_with_its_last_line(tmp_path, indent):
    whole = json.dumps([hotpot(), hotpot("Is B [a] {town}?", "yes")], indent=indent)
    assert_cut_list_is_refused(refusal, tmp_path / "cut.json", whole)

def test_a_line_cut_anywhere_is_refused_with_its_number(tmp_path):
    assert_cut_line_is_refused(refusal, tmp_path / "cut.jsonl", musique())

@pytest.mark.parametrize("record, field", [
    (hotpot(), "question"), (hotpot(), "answer"), (hotpot(), "context"),
    (musique(), "question"), (musique(), "answer"), (musique(), "paragraphs"),
])
def test_a_record_without_a_field(tmp_path, record, field):
    broken = {name: value for name, value in record.items() if name != field}
    assert_broken_record_is_refused_with_its_line(refusal, tmp_path / "data.json", record, broken)

GSM8K = {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}
NOT_OURS = {
    **FOREIGN,
    "gsm8k": lines([GSM8K] * 3), "gsm8k in a list": json.dumps([GSM8K] * 3),
    "answer is null": json.dumps([hotpot(answer=None)]), "question is a number": json.dumps([hotpot(7)]),
    "no passages": lines([{**musique(), "paragraphs": []}]), "context is text": json.dumps([hotpot(context="A B")]),
    "paragraphs without text": lines([{**musique(), "paragraphs": [{"title": "A"}]}]),
    "sentences are numbers": json.dumps([hotpot(context=[["A", [1, 2]]])]),
}

@pytest.mark.parametrize("name", NOT_OURS)
def test_foreign_json(tmp_path, name):
    assert_foreign_file_is_refused(refusal, tmp_path / "foreign.json", NOT_OURS[name])

@pytest.mark.parametrize("content", EMPTY)
def test_files_without_questions(tmp_path, content):
    assert_empty_file_is_refused(refusal, tmp_path / "empty.json", content)

def test_files_that_cannot_be_read(tmp_path):
    assert_unreadable_files_are_refused(refusal, tmp_path)

def test_half_a_surrogate_pair_does_not_get_to_the_tokenizer():
    # JSON can spell half of a pair, \ud83d, which is no character: a tokenizer raises TypeError on a text that has it.
    def tokenizer(text, add_special_tokens):
        return {"input_ids": list(text.encode())}

    assert bytes(encode(tokenizer, json.loads('"half \\ud83d of one"'))).decode() == "half ? of one"


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
KEYS = {"event", "step", "reward", "success", "generated_tokens", "forwarded_tokens", "tool_calls", "loss", "kl",
        "entropy", "grad_norm", "lr", "sampler_gap", *MACHINE}
# Just enough supervised steps that some leaves earn more than others: without that all advantages and gradients are 0.
SMALL = ["--sft-steps", "20", "--prompts", "2", "--eval-prompts", "4", "--turn-tokens", "16", "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.003", "--warmup", "2"]

def draw(out):
    """draw_tree, after a check that leaves and no other nodes have a reward."""
    labels, edges, leaves = draw_tree(out)
    assert all(("<br>R = " in label) == (node in leaves) for node, label in labels.items())
    return labels, edges, leaves

@pytest.fixture(scope="session")
def files(models, tmp_path_factory):
    """A folder of data files and models, good and bad, that many tests use and none changes."""
    folder = tmp_path_factory.mktemp("data") / "files"
    shutil.copytree(models, folder)
    good = json.dumps([hotpot(f"{NASTY} {i}") for i in range(6)], indent=1)
    (folder / "hotpot.json").write_text(good)
    (folder / "empty.json").write_text("")
    (folder / "cut.json").write_text(good[: len(good) // 2])
    (folder / "foreign.jsonl").write_text(lines([GSM8K] * 3))
    (folder / "one.jsonl").write_text(lines([musique()]))
    return folder

def test_built_in_run_leaves_its_metrics(whole):
    assert_small_run(metrics(whole[0]), 5, KEYS)
    steps = metrics(whole[0], "train")
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps[1:]) and steps[-1]["kl"] > 0
    assert len({row["loss"] for row in steps[1:]}) == 4

def test_built_in_run_draws_a_tree(whole):
    labels, _, leaves = draw(whole[0])
    assert re.match(r"(Who|Where) is the .* of \w+\?$", labels[0])
    assert len(leaves) == 2 * (1 + 2)  # M (1 + N L)
    assert all(re.search(r"<br>R = (0|0\.1|0\.2|0\.8|1), A = [+-]\d\.\d\d$", labels[leaf]) for leaf in leaves)

def test_built_in_run_ends_with_a_summary(whole):
    assert_summary(*whole, ("generated_tokens", "forwarded_tokens", "tool_calls"))

def test_built_in_run_leaves_a_model_for_transformers(whole):
    assert_trained_model(whole[0], "Who is the mayor of the birthplace of Ada?", most=14)

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    assert_same_first_step(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_chains_in_bfloat16_on_the_late_task_without_a_reference(quick_run, tmp_path):
    arguments = [*SMALL, "--prompts", "4", "--method", "grpo", "--M", "3", "--dtype", "bfloat16", "--hard", "late"]
    assert quick_run(tmp_path, *arguments, "--kl-coef", "0", "--steps", "2").returncode == 0
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("tree_grpo-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None] and any(row["grad_norm"] > 0 for row in steps)
    assert_bfloat16(out)
    _, edges, leaves = draw(out)
    assert_chains(edges, leaves, 3)

def test_limits_of_a_model_that_is_given(quick_run, whole, tmp_path):
    arguments = ["--steps", "0", "--eval-prompts", "2", "--model", whole[0] / "start", "--out", "out"]
    assert_limits(quick_run(tmp_path, *arguments), tmp_path / "out", lr=1e-6, turn_tokens=500, topk=1)

def test_a_qwen3_with_a_chat_template_on_hotpotqa(files, tmp_path):
    arguments = ["--model", files / "qwen3", "--data", files / "hotpot.json", "--steps", 1, "--prompts", 2,
                 "--eval-prompts", 2, "--max-turns", 2, "--turn-tokens", 8, "--out", "out"]
    process = SCRIPT.ran(tmp_path, *arguments)
    (step,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert KEYS <= set(step) and step["generated_tokens"] > 0 and step["lr"] == pytest.approx(1e-7)  # 1e-6 in 10 steps
    assert [row["step"] for row in evals] == [0, 1] and "held-out success" in process.stdout
    labels, _, leaves = draw(tmp_path / "out")
    assert len(leaves) == 6 and "wrote" in labels[0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")

@pytest.mark.parametrize("lr", ["1e3", "1e10"])
def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path, lr):
    # After a first step of this size no number is finite: with the first rate not the gradients of the second step,
    # with the second rate not even the probabilities to draw from.
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", lr, "--model", str(whole[0] / "start")]
    assert_stopped_before_breaking(quick_run(tmp_path, *arguments, "--out", "out"), tmp_path / "out")

def test_the_chat_template_makes_the_prompt(files):
    model, tokenizer = tree_grpo.load_model(str(files / "qwen3"), torch.device("cpu"))
    args = Args(data=str(files / "hotpot.json"), max_turns=3)
    question = read_questions(args.data)[0]
    agent = Agent(model, tokenizer, args, [], [])
    prompt = tokenizer.decode(agent.root(question).tokens)
    assert prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert question.text in prompt and "<search>" in prompt and "3 turns" in prompt


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(whole, tmp_path):
    SCRIPT.assert_resumes_after_a_kill(SCRIPT.run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(quick_run, whole, tmp_path):
    SCRIPT.assert_resumes_after_ctrl_c(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_in_its_warm_start_says_what_to_do(quick_run, tmp_path):
    process = SCRIPT.begin(tmp_path, *SMALL, "--sft-steps", "5000", "--out", "out")
    while "warm start" not in (text := process.stderr.read(20)):  # "" at its end
        assert text, "it ended before"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert last.startswith("stopped; ") and "another folder" in last
    SCRIPT.assert_refused(quick_run(tmp_path, *SMALL, "--out", "out"), "--out")
    SCRIPT.assert_refused(quick_run(tmp_path, "--resume", "out"), "--resume")

def test_ctrl_c_twice(tmp_path):
    arguments = [*SMALL, "--prompts", "80", "--save-every", "100", "--steps", "9", "--out", "out"]  # no step is short
    process = SCRIPT.begin(tmp_path, *arguments)
    wait_for_step(process, tmp_path / "out", 1)
    time.sleep(0.5)  # the row is written before the step has quite ended; now the next one has begun
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and errors.splitlines()[-1].startswith("stopped; ")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-000000"]


# ----------------------------------------------------------------------------------------------------------- bad input
OWN_BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --method ppo|--advantage none|--hard never|--K 0|--max-turns 0|--turn-tokens 0|--topk 0|--hops 1|--hops 5
    --search-url http://127.0.0.1:8000/retrieve|--advantage intra --method grpo|--advantage intra --L 0
    --advantage intra --K 1
""".strip())

@pytest.mark.parametrize("line", BAD_ARGUMENTS + OWN_BAD_ARGUMENTS)
def test_bad_argument(quick_run, tmp_path, line):
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, re.split("[ =]", line)[0], line)

@pytest.mark.parametrize("flag, line", [
    ("--data", "--data {files}/missing.json"), ("--data", "--data {files}/empty.json"), ("--data", "--data {files}"),
    ("--data", "--data {files}/cut.json --model {files}/qwen3"), ("--data", "--data {files}/foreign.jsonl"),
    ("--data", "--data {files}/qwen3/model.safetensors"), ("--data", "--data {files}/one.jsonl"),
    ("--model", "--model {files}/short --data {files}/hotpot.json"), ("--model", "--data {files}/hotpot.json"),
    ("--kl-coef", "--resume {runs}/good --steps 9 --kl-coef 0"), *BAD_FOLDERS,
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    line = line.format(files=files, runs=runs)
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, flag, line, files, runs)

def test_bad_data_is_named_with_its_line(quick_run, files, tmp_path):
    SCRIPT.assert_bad_data_is_named_with_its_line(quick_run, tmp_path, files / "cut.json")

def test_a_process_of_its_own_is_as_quiet(files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    SCRIPT.assert_refused(SCRIPT.run(tmp_path, "--model", files / "no-weights"), "--model")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    SCRIPT.assert_refused_before_slow_imports(tmp_path, "--method", "ppo")
