"""BM25: how well the words of a query meet those of a text."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"\w+")
K1, B = 0.9, 0.4
"""As Anserini and BEIR have them."""


class Bm25:
    """An index of N texts.

        score(q, d) = sum over words t of q of  idf(t) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
        idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5))

    for a word that n texts have, f times in d. Words are runs of letters and digits in lower case, without stemming.

    Source: Robertson and Zaragoza 2009, with Lucene's idf, which is never below 0.

    Example:
        found = Bm25(["red shoes", "green hat", "red hat"])
        found.scores("red hat").argmax() == 2
    """

    def __init__(self, texts: Iterable[str], k1: float = K1, b: float = B) -> None:
        postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        lengths = []
        for number, text in enumerate(texts):
            counts = Counter(words_of(text))
            lengths.append(sum(counts.values()))
            for word, count in counts.items():
                postings[word].append((number, count))
        self._num_texts = len(lengths)
        length = np.array(lengths, dtype=np.float64)
        self._damping = k1 * (1 - b + b * length / max(float(length.mean()) if len(length) else 1.0, 1.0))
        self._postings = {word: np.array(found, dtype=np.int32) for word, found in postings.items()}
        self._k1 = k1

    def scores(self, query: str) -> np.ndarray:
        """float [N]: the score of every text; words that no text has count nothing."""
        found = np.zeros(self._num_texts)
        for word in words_of(query):
            if word in self._postings:
                texts, counts = self._postings[word].T
                idf = math.log(1 + (self._num_texts - len(texts) + 0.5) / (len(texts) + 0.5))
                found[texts] += idf * counts * (self._k1 + 1) / (counts + self._damping[texts])
        return found

    def best(self, query: str, most: int) -> list[int]:
        """The numbers of the best texts that share a word with the query, best first, then the earlier."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:most]
        return order[scores[order] > 0].tolist()


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower())
