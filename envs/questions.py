"""Questions of a file for tree_grpo.py --data, whose answers are found by searching.

HotpotQA, 2Wiki   question, answer, context: [[title, [sentence, ...]], ...] or, as on the hub,
                  {"title": [...], "sentences": [[...], ...]}
MuSiQue           question, answer, answer_aliases, answerable,
                  paragraphs: [{"title": ..., "paragraph_text": ...}, ...]
Search-R1         question, golden_answers: [...]; with --search-url only, as any of the others
                  without its passages"""

import re
import string
import unicodedata
from dataclasses import dataclass

from records import read_records, split_data, text_of
from retrieval import BM25, SearchServer, show_passages

ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)  # as tree_grpo.py reads it
WORDS = r"((?!</?(?:think|search|information|answer)>).)*"
STEP = re.compile(
    rf"\s*<think>{WORDS}</think>\s*<(?P<action>search|answer)>{WORDS}</(?P=action)>\s*", re.DOTALL
)
PLAIN = str.maketrans("‐‑‒–—―−‘’‚‛′“”„‟″", "-" * 7 + "'" * 5 + '"' * 5)  # as keyboards have them


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. What would leave nothing is not done:
    there is a band called The The."""
    plain = unicodedata.normalize("NFC", answer).translate(PLAIN).lower()
    words = "".join(c for c in plain if c not in string.punctuation)
    without = re.sub(r"\b(a|an|the)\b", " ", words)
    left = next((text for text in (without, words, plain) if text.strip()), "")
    return " ".join(left.split())


def outcome_reward(turns: list[str], answers: list[str]) -> float:
    """R(H) of a finished trajectory, from the texts of its turns."""
    action = ACTION.search(turns[-1])
    answered = action is not None and action[1] == "answer"
    said = normalise(action[2]) if answered else ""
    match = said != "" and said in map(normalise, answers)
    steps = [STEP.fullmatch(turn) for turn in turns]
    actions = [step["action"] if step else None for step in steps]
    well_formed = actions == ["search"] * (len(turns) - 1) + ["answer"]
    if match:
        return 1.0 if well_formed else 0.8
    if well_formed:
        return 0.2
    return 0.1 if answered else 0.0


@dataclass
class Question:
    text: str
    answers: list[str]  # the answer and its aliases


def answers_of(record: dict) -> list[str]:
    if "golden_answers" in record:
        name, answers = "golden_answers", []
    else:
        name, answers = "answer_aliases", [text_of(record, "answer")]
    more = record.get(name) or []
    if not isinstance(more, list) or not answers + more:
        raise ValueError(f"{name}: want a list of texts")
    return answers + [text_of({name: text}, name) for text in more]


def passages_of(record: dict) -> list[tuple[str, str]]:
    name = "paragraphs" if "paragraphs" in record else "context"
    parts, passages = record.get(name) or [], []
    try:
        if name == "paragraphs":
            parts = [(part["title"], [part["paragraph_text"]]) for part in parts]
        elif isinstance(parts, dict):
            parts = zip(parts["title"], parts["sentences"], strict=True)
        for title, sentences in parts:
            if not isinstance(title, str) or not isinstance(sentences, list):
                raise TypeError("a title or its sentences")
            passages.append((title, " ".join(sentence.strip() for sentence in sentences)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {type(error).__name__}, {error}") from None
    if not passages:
        raise ValueError(f"{name}: there are no passages, so give --search-url")
    return passages


class Questions:
    """The questions of --data. A search looks into all of its passages, or asks the server of
    --search-url."""

    def __init__(self, args):
        self.topk, self.server, pool = args.topk or 3, None, {}
        if args.search_url:
            self.server = SearchServer(args.search_url, self.topk, args.search_timeout)

        def parse(record: dict) -> Question | None:
            text = text_of(record, "question")
            passages = [] if self.server else passages_of(record)
            usable = record.get("answerable") is not False  # as some of MuSiQue are not
            question = Question(text, answers_of(record)) if usable else None
            pool.update(dict.fromkeys(passages))
            return question

        found = read_records(args, parse, "HotpotQA, 2Wiki, MuSiQue or Search-R1")
        self.training, self.held_out = split_data(found, args.eval_prompts)
        self.index = None if self.server else BM25(list(pool))

    def search(self, asked: list[tuple[Question, str]]) -> list[str]:
        """An observation for each question's query."""
        queries = [query for _, query in asked]
        if self.server:
            return self.server.ask(queries)
        return [show_passages(self.index.top(query, self.topk)) for query in queries]

    def reward(self, question: Question, turns: list[str]) -> float:
        return outcome_reward(turns, question.answers)
