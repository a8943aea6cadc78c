"""The filters and metrics of lm-evaluation-harness for the benchmarks that are known by name, as pure functions.

Each takes what a model wrote as its answer and gives the harness's own metrics, so that scores can be set beside
published ones. Source: lm_eval/tasks and lm_eval/filters of lm-evaluation-harness 0.4.13 (MIT licence).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

INVALID = "[invalid]"
GSM8K_STRICT = r"#### (\-?[0-9\.\,]+)"
GSM8K_FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
GSM8K_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
GPQA_STRICT = r"(?<=The answer is )(.*)(?=.)"
MMLU_STRICT = (
    r"((?<=The answer is )(.*)(?=.)|(?<=answer is )(.*)(?=.)"
    r"|(?<=The answer: )(.*)(?=.)|(?<=The final answer: )(.*)(?=.))"
)
CHOICE_FLEXIBLE = r"(\([A-Z]\))"


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings at which the harness ends an output."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def by_regex(text: str, pattern: str, select: int) -> str:
    """The filter `regex`: the match of that number, its first group that is not empty; INVALID without one."""
    matches = re.findall(pattern, text)
    if not matches:
        return INVALID
    match = matches[select]
    if isinstance(match, tuple):
        match = next((group for group in match if group), INVALID)
    return str(match).strip()


def by_choice(text: str, choices: Sequence[str]) -> str:
    """The filter `multi_choice_regex`: the last letter in brackets, else the last choice by its text, else `: B`."""
    found = re.findall(CHOICE_FLEXIBLE, text)
    if found:
        return str(found[-1]).strip()
    names = {_ignoring(choice.strip()): f"({string.ascii_uppercase[place]})" for place, choice in enumerate(choices)}
    named = re.findall("|".join(re.escape(name) for name in names), _ignoring(text))
    if named and (name := named[-1].strip()):
        return names.get(name, name)
    letters = "|".join(string.ascii_uppercase[: len(choices)])
    lettered = re.findall(rf":[\s]*({letters})", text)
    return f"({lettered[-1]})" if lettered else INVALID


def exact_match(found: str, target: str, *, ignored: Sequence[str] = (), ignore_punctuation: bool = False) -> float:
    """The metric `exact_match` with ignore_case: 1 where both are equal without what is ignored, else 0."""
    for pattern in ignored:
        found, target = re.sub(pattern, "", found), re.sub(pattern, "", target)
    found, target = found.lower(), target.lower()
    if ignore_punctuation:
        table = str.maketrans("", "", string.punctuation)
        found, target = found.translate(table), target.translate(table)
    return float(found == target)


def gsm8k_metrics(text: str, target: str) -> dict[str, float]:
    """`strict` and `flexible` of gsm8k; `target` is the whole worked answer."""
    text = cut_at(text, ("Question:", "</s>", "<|im_end|>"))
    found = {"strict_match": by_regex(text, GSM8K_STRICT, 0), "flexible_extract": by_regex(text, GSM8K_FLEXIBLE, -1)}
    return {name: exact_match(value, target, ignored=GSM8K_IGNORED) for name, value in found.items()}


def choice_metrics(
    text: str, target: str, choices: Sequence[str], strict: str, stops: Sequence[str]
) -> dict[str, float]:
    """`strict` and `flexible` of the multiple-choice tasks with a chain of thought; `target` is such as (B)."""
    text = cut_at(text, stops)
    found = {"strict_match": by_regex(text, strict, 0), "flexible_extract": by_choice(text, choices)}
    return {name: exact_match(value, target, ignore_punctuation=True) for name, value in found.items()}


def _ignoring(text: str) -> str:
    return "".join(sign for sign in text.lower() if sign not in string.punctuation)
