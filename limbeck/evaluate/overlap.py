"""Whether a trace has words in common with problems that a model is to be tested on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from limbeck.traces.trace import Trace


class Overlap:
    """Runs of `ngram` words in the prompts of evaluation problems; shorter problems must be equal as a whole."""

    def __init__(self, problems: Iterable[Trace], ngram: int) -> None:
        self.ngram = ngram
        words = [prompt_words(problem) for problem in problems]
        self._whole = {tuple(each) for each in words if len(each) < ngram}
        self._runs = {run for each in words for run in _runs(each, ngram)}

    def has(self, trace: Trace) -> bool:
        """Whether the trace's prompt shares a run with a problem, or is a short one of them."""
        words = prompt_words(trace)
        return tuple(words) in self._whole or any(run in self._runs for run in _runs(words, self.ngram))


def prompt_words(trace: Trace) -> list[str]:
    """Words and numbers of the user's turns, in lower case, and every other sign that is no blank, one by one."""
    text = " ".join(message["content"] for message in trace.messages if message["role"] == "user")
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _runs(words: Sequence[str], ngram: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1))
