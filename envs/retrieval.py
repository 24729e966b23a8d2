"""What a search looks into: BM25 over passages, or a search server.

tree_grpo.py's tasks, envs/facts.py and envs/questions.py, use it."""

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from array import array
from collections import Counter

import torch
from tqdm import tqdm


class BM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over passages, pairs of title and text; words in lower
    case."""

    def __init__(self, passages: list[tuple[str, str]]):
        self.passages, self.postings, lengths = passages, {}, []
        for i, passage in enumerate(tqdm(passages, "index", unit="passage", leave=False, delay=1)):
            words = Counter(re.findall(r"\w+", " ".join(passage).lower()))
            lengths.append(float(words.total()))
            for word, n in words.items():  # a posting: the passage's number, how often it is there
                self.postings.setdefault(word, array("q")).extend((i, n))
        mean = max(1, sum(lengths) / len(lengths))
        self.scale = 1.2 * (0.25 + 0.75 * torch.tensor(lengths) / mean)

    def top(self, query: str, k: int) -> list[tuple[str, str]]:
        """The k best of the passages that share a word with the query, best first."""
        scores = torch.zeros(len(self.passages))
        for word in sorted(self.postings.keys() & set(re.findall(r"\w+", query.lower()))):
            postings = torch.frombuffer(self.postings[word], dtype=torch.int64).view(-1, 2)
            numbers, tf = postings[:, 0], postings[:, 1].float()
            rarity = math.log(1 + (len(scores) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            scores[numbers] += rarity * 2.2 * tf / (tf + self.scale[numbers])
        best = scores.topk(min(k, len(scores)))
        ranked = zip(best.indices.tolist(), best.values.tolist())
        return [self.passages[i] for i, score in ranked if score > 0]


def show_passages(passages: list[tuple[str, str]]) -> str:
    lines = [": ".join(filter(None, passage)) for passage in passages]
    return "\n".join(lines) or "nothing found"


FAILED = "the search failed, there are no results"
TRIAL = ["capital of Italy"]  # a query for a server that any can answer


class SearchServer:
    """A server that speaks Search-R1's protocol, at --search-url: POST {"queries": [text, ...],
    "topk": k, "return_scores": true} is answered by {"result": [hits of each query]}, where a hit
    is {"document": {"contents": "title\\ntext"}}. On this machine it is asked without a proxy.

    timeout: about how many seconds a request may take. ValueError if no query is answered now."""

    def __init__(self, url: str, topk: int, timeout: float):
        self.url, self.topk, self.timeout, self.gone, self.reason = url, topk, timeout, False, ""
        if not self.answers(TRIAL):
            raise ValueError(f"--search-url {url}: no search server answers ({self.reason})")

    def ask(self, queries: list[str], most: int = 32) -> list[str]:
        """An observation for each query, from requests of at most so many. Never raises.

        A request that fails three times is split in halves, these again, and so on, so that a query
        on which the server fails spoils no other. If the server does not even answer the trial,
        nothing is asked any more until it does. This takes no longer than all requests may, and
        eight more."""
        parts = [queries[i : i + most] for i in range(0, len(queries), most)]
        until = time.monotonic() + self.timeout * (len(parts) + 8)
        self.gone = self.gone and not self.answers(TRIAL)
        found = [text for part in parts for text in self.ask_part(part, until, tries=3)]
        if FAILED in found:
            shown = f"{found.count(FAILED)} of {len(found)} searches failed ({self.reason})"
            tqdm.write(f"--search-url {self.url}: {shown}", file=sys.stderr)
        return found

    def ask_part(self, queries: list[str], until: float, tries: int) -> list[str]:
        for attempt in range(tries):
            if self.gone or time.monotonic() > until:
                return [FAILED] * len(queries)
            time.sleep(0.5 * attempt)
            if found := self.answers(queries):
                return found
        self.gone = not self.answers(TRIAL)
        if len(queries) == 1:
            return [FAILED]
        middle = len(queries) // 2
        halves = queries[:middle], queries[middle:]
        return [text for half in halves for text in self.ask_part(half, until, tries=1)]

    def answers(self, queries: list[str]) -> list[str] | None:
        """What request returns, or None if it fails."""
        try:
            return self.request(queries)
        except Exception as error:  # noqa: BLE001 (whatever a server does, training goes on)
            self.reason = f"{type(error).__name__}: {error}"
            return None

    def request(self, queries: list[str]) -> list[str]:
        host = urllib.parse.urlsplit(self.url).hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        direct = [urllib.request.ProxyHandler({})] if here else []
        opener = urllib.request.build_opener(*direct)
        asked = {"queries": queries, "topk": self.topk, "return_scores": True}
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), header)
        body, until = b"", time.monotonic() + self.timeout
        with opener.open(request, timeout=self.timeout) as reply:
            while part := reply.read1():
                body += part
                if len(body) > 65536 * (len(queries) + 1) or time.monotonic() > until:
                    raise ValueError("its answer is too long, or takes too long")
        observations = []
        for _, hits in zip(queries, json.loads(body)["result"], strict=True):
            texts = [hit["document"]["contents"] for hit in hits[: self.topk]]
            observations.append(show_passages([text.partition("\n")[::2] for text in texts]))
        return observations
