"""Parsers of formats in which prompt, thought and answer have fields of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import Message
from limbeck.traces.content import as_list, text_of
from limbeck.traces.record import (
    REFERENCE_COLUMNS,
    SYSTEM_COLUMNS,
    VERDICT_COLUMNS,
    Parsed,
    Record,
    field,
    first_present,
    flags_in,
    parsed_trace,
    prompt_columns,
    prompt_in,
    reference_in,
    system_in,
    user_prompt,
    verdict_in,
    with_metadata,
)
from limbeck.traces.templated import without_end
from limbeck.traces.thought import THINK, Markers, Thought, join_thought, split_thought, unclosed_thought

GSM8K_MARKER = "####"
_ANSWERS = ("completion", "response", "output", "final_answer", "answer", "solution", "attempt")
COT_COLUMNS: dict[str, tuple[str, ...]] = {
    "cot": ("answer", *_ANSWERS),
    "deepseek_thinking_trajectory": ("deepseek_attempt",),
    "thinking_trajectories": ("attempt",),
    "deepseek_reasoning": ("deepseek_solution",),
    **dict.fromkeys(
        ("thinking", "reasoning", "reasoning_content", "thought", "rationale", "chain_of_thought", "complex_cot"),
        _ANSWERS,
    ),
}
"""Column of the thought: columns of the answer to it. Of several in a record the first is read."""


def _used_columns(record: Record) -> tuple[str, ...]:
    """The columns that are read; all others are metadata."""
    pairs = [name for cot, names in COT_COLUMNS.items() if cot in record for name in (cot, *names)]
    return (*prompt_columns(record), *SYSTEM_COLUMNS, *pairs, *REFERENCE_COLUMNS, *VERDICT_COLUMNS, "deepseek_grade")


def parse_columns(record: Record, markers: Markers | None) -> list[Parsed]:
    """Prompt, thought and answer in columns of their own (s1K), or several generations (OpenR1-Math)."""
    messages = user_prompt(prompt_in(record), system_in(record))
    if record.get("generations") is not None:
        return list(_parse_generations(record, messages, markers))
    cot_name = first_present(record, COT_COLUMNS)
    answer_name = first_present(record, COT_COLUMNS[cot_name])
    cots, answers = _as_list(record[cot_name]), _as_list(field(record, answer_name))
    if len(cots) != len(answers):
        raise TraceFormatError(f"unequal lists: {len(cots)} of {cot_name} and {len(answers)} of {answer_name}")
    references = [name for name in REFERENCE_COLUMNS if name != answer_name]
    reference, correct = reference_in(record, references), verdict_in(record, (*VERDICT_COLUMNS, "deepseek_grade"))
    used = _used_columns(record)
    result = []
    for cot, answer in zip(cots, answers, strict=True):
        text = without_end(text_of(answer, answer_name))
        if text.lstrip().startswith((markers or THINK).start):
            raise TraceFormatError(f"two thoughts: one in {cot_name}, another in {answer_name}")
        thought = join_thought(text_of(cot, cot_name), text, markers or THINK)
        result.append(with_metadata(parsed_trace(messages, thought, reference, correct), record, used))
    return result


def parse_gsm8k(record: Record, markers: Markers | None) -> list[Parsed]:
    """GSM8K: a worked solution, four hashes, the final value; the value without commas is the reference."""
    messages = user_prompt(field(record, "question"), system_in(record))
    solution = text_of(field(record, "answer"), "answer")
    if solution.count(GSM8K_MARKER) > 1:
        raise TraceFormatError(f"two thoughts: the answer holds {GSM8K_MARKER} more than once")
    cot, marker, answer = solution.partition(GSM8K_MARKER)
    used = ("question", "answer", *SYSTEM_COLUMNS)
    if not marker:
        thought = unclosed_thought(cot, f"missing end marker: the answer holds no {GSM8K_MARKER}")
        return [with_metadata(parsed_trace(messages, thought), record, used)]
    thought = join_thought(cot, answer)
    parsed = parsed_trace(messages, thought, reference=_plain_number(answer), correct=True)
    return [with_metadata(parsed, record, used)]


def parse_reasoning_gym(record: Record, markers: Markers | None) -> list[Parsed]:
    """reasoning-gym: question, answer, and for gsm_symbolic a worked solution in metadata.answer_cot.

    The answer is the official one; its verdict is whether the solution ends in that number (16.0 for 16).
    """
    messages = user_prompt(field(record, "question"))
    answer = text_of(field(record, "answer"), "answer").strip()
    metadata = field(record, "metadata")
    if not isinstance(metadata, Mapping):
        raise TraceFormatError(f"metadata is not an object: it is {type(metadata).__name__}")
    solution = metadata.get("answer_cot")
    if isinstance(solution, str):
        cot, _, value = solution.partition(GSM8K_MARKER)
        parsed = parsed_trace(messages, join_thought(cot, answer), answer, _same_number(value, answer))
    else:
        task = metadata.get("source_dataset")
        problem = f"no thought: the task {task!r} carries no worked solution, gsm_symbolic does"
        parsed = parsed_trace(messages, Thought(None, answer, problem=problem), answer)
    return [with_metadata(parsed, metadata, used=("answer_cot", "answer_value"))]


def _parse_generations(record: Record, messages: tuple[Message, ...], markers: Markers | None) -> Iterator[Parsed]:
    """One trace a generation; a bad generation leaves the others of its row good."""
    generations = as_list(record["generations"])
    if not isinstance(generations, list) or not generations:
        raise TraceFormatError("no generations: the field is not a list of replies")
    verdicts = [flags_in(record, name, len(generations)) for name in ("correctness_math_verify", "correctness_llama")]
    reference = reference_in(record, ("answer", *REFERENCE_COLUMNS))
    used = (*prompt_columns(record), *REFERENCE_COLUMNS, *SYSTEM_COLUMNS, "generations", "messages")
    used = (*used, "correctness_math_verify", "correctness_llama")
    for index, generation in enumerate(generations):
        try:
            thought = split_thought(without_end(text_of(generation, "a generation")), markers)
        except TraceFormatError as error:
            yield Parsed(None, str(error))
            continue
        correct = next((flags[index] for flags in verdicts if flags[index] is not None), None)
        parsed = with_metadata(parsed_trace(messages, thought, reference, correct), record, used)
        yield with_metadata(parsed, {"generation": index}, used=())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain_number(text: str) -> str:
    return text.strip().replace(",", "").removeprefix("$")


def _same_number(first: str, second: str) -> bool | None:
    """Whether two numerals are equal up to float error; None when one is not a numeral."""
    try:
        return math.isclose(float(_plain_number(first)), float(_plain_number(second)), rel_tol=1e-9)
    except ValueError:
        return None
