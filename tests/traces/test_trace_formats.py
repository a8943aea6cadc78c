"""Every trace format does the same: same prompt, thought and answer, whatever carries them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from limbeck.errors import TraceFormatError
from limbeck.traces.parse import FORMATS, detect
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trace import Trace, write_jsonl

QUOTING_PROMPT = "What do <think> and </think>, <|begin_of_thought|> and <|end_of_thought|>, #### and [[ ]] mean?\n"
COT = "First, 2 + 2.\n\nThat makes 4."
ANSWER = "The result is 4."


class Case(NamedTuple):
    """One way to write a trace down."""

    format: str
    build: Callable[[str, str, str], dict[str, Any]]
    """Record of prompt, cot, answer."""
    cut: Callable[[str, str], dict[str, Any]] | None
    """Record of prompt and cot that ends inside the thought; None where the format cannot say that."""
    multi_turn: bool = False
    config: Mapping[str, Any] = MappingProxyType({})


def messages(prompt: str, reply: str, **extra: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply, **extra}]


def conversations(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]


def think(cot: str, answer: str) -> str:
    return f"<think>\n{cot}\n</think>\n\n{answer}"


def sky(cot: str, answer: str, blank: str) -> str:
    thought = f"<|begin_of_thought|>{blank}{cot}{blank}<|end_of_thought|>"
    return f"{thought}{blank}<|begin_of_solution|>{blank}{answer}{blank}<|end_of_solution|>"


def sky_case(blank: str) -> Case:
    return Case(
        "sharegpt",
        lambda p, c, a: {"conversations": conversations(p, sky(c, a, blank))},
        lambda p, c: {"conversations": conversations(p, f"<|begin_of_thought|>{blank}{c}")},
        multi_turn=True,
    )


CASES = {
    "limbeck": Case(
        "limbeck",
        lambda p, c, a: {"limbeck_trace": 1, "messages": messages(p, "")[:1], "cot": c, "answer": a},
        lambda p, c: {
            "limbeck_trace": 1,
            "messages": messages(p, "")[:1],
            "cot": c,
            "answer": None,
            "cot_closed": False,
        },
    ),
    "messages, think tags": Case(
        "messages",
        lambda p, c, a: {"messages": messages(p, think(c, a))},
        lambda p, c: {"messages": messages(p, f"<think>\n{c}")},
        multi_turn=True,
    ),
    "messages, opening tag prefilled": Case(
        "messages",
        lambda p, c, a: {"messages": messages(p, f"{c}\n</think>\n\n{a}")},
        None,
        multi_turn=True,
    ),
    "messages, lists of parts": Case(
        "messages",
        lambda p, c, a: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": p}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": f"<think>{c}"},
                        {"type": "text", "text": f"</think>{a}"},
                    ],
                },
            ]
        },
        None,
        multi_turn=True,
    ),
    "messages, reasoning_content": Case(
        "messages",
        lambda p, c, a: {"messages": messages(p, a, reasoning_content=c)},
        lambda p, c: {"messages": messages(p, None, reasoning_content=c)},
        multi_turn=True,
    ),
    "messages, custom markers": Case(
        "messages",
        lambda p, c, a: {"messages": messages(p, f"[[ {c} ]] {a}")},
        lambda p, c: {"messages": messages(p, f"[[ {c}")},
        multi_turn=True,
        config={"markers": ("[[", "]]")},
    ),
    "sharegpt, no blank": sky_case(""),
    "sharegpt, one newline": sky_case("\n"),
    "sharegpt, two newlines": sky_case("\n\n"),
    "sharegpt, carriage returns": sky_case("\r\n \r\n"),
    "sharegpt, think tags": Case(
        "sharegpt",
        lambda p, c, a: {"conversations": conversations(p, think(c, a))},
        lambda p, c: {"conversations": conversations(p, f"<think>{c}")},
        multi_turn=True,
    ),
    "prompt and completion": Case(
        "prompt_completion",
        lambda p, c, a: {"prompt": p, "completion": think(c, a)},
        lambda p, c: {"prompt": p, "completion": f"<think>{c}"},
    ),
    "prompt and completion, turns": Case(
        "prompt_completion",
        lambda p, c, a: {
            "prompt": messages(p, "")[:1],
            "completion": messages(p, a, reasoning_content=c)[1:],
        },
        lambda p, c: {"prompt": messages(p, "")[:1], "completion": messages(p, f"<think>{c}")[1:]},
    ),
    "text, templated": Case(
        "text",
        lambda p, c, a: {"text": f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{think(c, a)}<|im_end|>\n"},
        lambda p, c: {"text": f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n<think>{c}"},
    ),
    "columns, s1K": Case(
        "columns",
        lambda p, c, a: {"question": p, "thinking_trajectories": [c], "attempt": a, "solution": "4"},
        None,
    ),
    "columns, s1K-1.1": Case(
        "columns",
        lambda p, c, a: {"question": p, "deepseek_thinking_trajectory": c, "deepseek_attempt": a},
        None,
    ),
    "columns, OpenR1-Math": Case(
        "columns",
        lambda p, c, a: {"problem": p, "generations": [think(c, a)], "messages": messages(p, "else")},
        lambda p, c: {"problem": p, "generations": [f"<think>{c}"]},
    ),
    "columns, renamed": Case(
        "columns",
        lambda p, c, a: {"q": p, "r1_trace": c, "final": a, "cot": "another", "answer": "another"},
        None,
        config={"fields": {"q": "prompt", "r1_trace": "cot", "final": "answer"}},
    ),
    "gsm8k": Case(
        "gsm8k",
        lambda p, c, a: {"question": p, "answer": f"{c}\n#### {a}"},
        None,
    ),
    "reasoning_gym": Case(
        "reasoning_gym",
        lambda p, c, a: {"question": p, "answer": a, "metadata": {"answer_cot": f"{c}\n#### {a}"}},
        None,
    ),
}
CUT_CASES = {name: case for name, case in CASES.items() if case.cut}


def read(tmp_path: Path, records: list[Any], **config: Any) -> tuple[list[Trace], Any]:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_traces(TraceConfig(source=str(path), **config))


def test_every_format_has_a_case() -> None:
    assert {case.format for case in CASES.values()} | {"prompts"} == set(FORMATS), "prompts alone are no traces"


@pytest.mark.parametrize("prompt", ["What is 2 + 2?", QUOTING_PROMPT])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("named", [False, True], ids=["auto", "named"])
def test_segments(tmp_path: Path, case: Case, prompt: str, named: bool) -> None:
    format_name = case.format if named else "auto"
    traces, counts = read(tmp_path, [case.build(prompt, COT, ANSWER)], format=format_name, **case.config)
    (trace,) = traces
    assert [dict(message) for message in trace.messages] == [{"role": "user", "content": prompt}]
    assert (trace.cot, trace.answer, trace.cot_closed) == (COT, ANSWER, True)
    assert trace.source == f"{tmp_path / 'traces.jsonl'}:1"
    assert (counts.read, counts.kept, counts.skipped, counts.kept_bad, counts.reasons) == (1, 1, 0, 0, {})


@pytest.mark.parametrize("case", CUT_CASES.values(), ids=CUT_CASES)
def test_missing_end_marker(tmp_path: Path, case: Case) -> None:
    assert case.cut
    records = [case.build("Good?", COT, ANSWER), case.cut(QUOTING_PROMPT, COT)]
    with pytest.raises(TraceFormatError, match=r"traces\.jsonl:2: missing end marker") as caught:
        read(tmp_path, records, **case.config)
    assert "\n" not in str(caught.value)

    skipped, counts = read(tmp_path, records, on_bad="skip", **case.config)
    assert [trace.answer for trace in skipped] == [ANSWER]
    assert (counts.read, counts.kept, counts.skipped, counts.kept_bad) == (2, 1, 1, 0)
    assert counts.reasons == {"missing end marker": 1}

    kept, counts = read(tmp_path, records, on_bad="keep", **case.config)
    assert (kept[1].cot, kept[1].answer, kept[1].cot_closed) == (COT, None, False)
    assert kept[1].messages[-1]["content"] == QUOTING_PROMPT
    assert (counts.read, counts.kept, counts.skipped, counts.kept_bad) == (2, 2, 0, 1)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.multi_turn],
    ids=[n for n, c in CASES.items() if c.multi_turn],
)
def test_multi_turn(tmp_path: Path, case: Case) -> None:
    """Earlier assistant turns are prompt, their thoughts among them; only the last turn is split."""
    record = case.build("And 2 + 2?", COT, ANSWER)
    name = "messages" if "messages" in record else "conversations"
    role, content = ("role", "content") if name == "messages" else ("from", "value")
    earlier = [
        {role: "system", content: "Be brief."},
        {role: "user" if name == "messages" else "human", content: "1 + 1?"},
        {role: "assistant" if name == "messages" else "gpt", content: think("One and one.", "2")},
    ]
    (trace,), _ = read(tmp_path, [{name: earlier + record[name]}], **case.config)
    assert [message["role"] for message in trace.messages] == ["system", "user", "assistant", "user"]
    assert trace.messages[2]["content"] == think("One and one.", "2")
    assert trace.messages[3]["content"] == "And 2 + 2?"
    assert (trace.cot, trace.answer) == (COT, ANSWER)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_round_trip_through_own_format(tmp_path: Path, case: Case) -> None:
    records = [case.build(QUOTING_PROMPT, COT, ANSWER)] + ([case.cut("Cut?", COT)] if case.cut else [])
    traces, _ = read(tmp_path, records, on_bad="keep", **case.config)
    write_jsonl(traces, tmp_path / "own.jsonl")
    again, counts = read_traces(TraceConfig(source=str(tmp_path / "own.jsonl"), on_bad="keep"))
    assert again == traces
    assert counts.kept_bad == len(records) - 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parquet_equals_json_lines(tmp_path: Path, case: Case) -> None:
    records = [case.build(QUOTING_PROMPT, COT, ANSWER), case.build("Other?", COT, ANSWER)]
    from_lines, _ = read(tmp_path, records, **case.config)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "traces.parquet")
    from_rows, _ = read_traces(TraceConfig(source=str(tmp_path / "traces.parquet"), **case.config))
    assert from_rows[1].source == f"{tmp_path / 'traces.parquet'}:row 2"
    assert [replace(trace, source="") for trace in from_rows] == [replace(trace, source="") for trace in from_lines]


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.format != "limbeck"])
def test_whitespace_around_segments_is_not_theirs(tmp_path: Path, case: Case) -> None:
    """limbeck's own format is left out: it keeps every character."""
    (trace,), _ = read(tmp_path, [case.build("Hm?", f"\n \n{COT}\n\n\n", f"\n{ANSWER} \n")], **case.config)
    assert (trace.cot, trace.answer) == (COT, ANSWER)


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.config])
def test_detect_names_the_format(case: Case) -> None:
    assert detect(case.build("Hm?", COT, ANSWER)) == case.format
