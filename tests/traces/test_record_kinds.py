"""Records as people write them: keys, roles, typed parts, columns, templated text. Read, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from limbeck.errors import TraceFormatError
from limbeck.traces.sources import TraceConfig, read_problems, read_traces

REPLY = "<think>Half of ten.</think>Five."
ASK = {"role": "user", "content": "Half of ten?"}


class Read(NamedTuple):
    """What was read of one record."""

    roles: list[str]
    asked: str
    cot: str | None
    answer: str | None
    reference: str | None
    correct: bool | None
    notes: list[str]


def read(tmp_path: Path, record: Any, **config: Any) -> Read:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (trace,), counts = read_traces(TraceConfig(source=str(path), **config))
    roles = [message["role"] for message in trace.messages]
    asked = trace.messages[-1]["content"]
    return Read(roles, asked, trace.cot, trace.answer, trace.reference, trace.correct, list(counts.notes))


def turn(**keys: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", **keys}]}


def parts(*entries: Any) -> dict[str, Any]:
    return turn(content=list(entries))


def text(value: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": value}


CHATML = "<|im_start|>user\nHalf of ten?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>{0}<|end_header_id|>\n\n{1}<|eot_id|>"

SAME: dict[str, Any] = {
    "thinking key": turn(content="Five.", thinking="Half of ten."),
    "reasoning key": turn(content="Five.", reasoning="Half of ten."),
    "one thought under two keys": turn(content="Five.", reasoning="Half of ten.", reasoning_content="Half of ten."),
    "null thought beside tags": turn(content=REPLY, thinking=None, reasoning_content=None),
    "thinking part": parts({"type": "thinking", "thinking": "Half of ten.", "signature": "x"}, text("Five.")),
    "reasoning part": parts({"type": "reasoning", "text": "Half of ten."}, text("Five.")),
    "reasoning part with a summary": parts(
        {"type": "reasoning", "summary": [text("Half of ten.", "summary_text")]}, text("Five.", "output_text")
    ),
    "parts of a struct column": parts({**text(REPLY), "image_url": None, "thinking": None}),
    "parts of the prompt": {
        "messages": [
            {"role": "user", "content": [text("Half of ten?", "input_text")]},
            turn(content=REPLY)["messages"][1],
        ]
    },
    "contents with thought parts": {
        "contents": [
            {"role": "user", "parts": [{"text": "Half of ten?"}]},
            {"role": "model", "parts": [{"text": "Half of ten.", "thought": True}, {"text": "Five."}]},
        ]
    },
    "capital roles": {"messages": [{**ASK, "role": "User"}, {"role": "ASSISTANT", "content": REPLY}]},
    "other roles": {"conversations": [{"from": "prompter", "value": "Half of ten?"}, {"from": "bot", "value": REPLY}]},
    "keys of another row": {
        "conversations": [
            {"from": "human", "value": "Half of ten?", "role": None, "content": None},
            {"from": "gpt", "value": REPLY, "role": None, "content": None},
        ],
        "messages": None,
        "prompt": None,
    },
    "turns as JSON text": {"messages": json.dumps(turn(content=REPLY)["messages"])},
    "turns as Python prints them": {"conversations": str(turn(content=REPLY)["messages"])},
    "the record as JSON text": json.dumps({"prompt": "Half of ten?", "completion": REPLY}),
    "two assistant turns": {
        "messages": [
            ASK,
            {"role": "assistant", "content": "<think>Half of ten.</think>"},
            {"role": "assistant", "content": "Five."},
        ]
    },
    "capital columns": {"Question": "Half of ten?", "Response": REPLY},
    "query and response": {"query": "Half of ten?", "response": REPLY},
    "problem and generated_solution": {"problem": "Half of ten?", "generated_solution": REPLY},
    "question and answer with a thought": {"question": "Half of ten?", "answer": REPLY},
    "instruction alone": {"instruction": "Half of ten?", "input": " ", "output": REPLY},
    "question, reasoning, answer": {"question": "Half of ten?", "reasoning": "Half of ten.", "answer": "Five."},
    "Question, Complex_CoT, Response": {"Question": "Half of ten?", "Complex_CoT": "Half of ten.", "Response": "Five."},
    "prompt of parts": {"prompt": [text("Half of ten?")], "completion": REPLY},
    "templated text": {"text": CHATML + REPLY + "<|im_end|>\n"},
    "templated for Llama": {
        "text": "<|begin_of_text|>" + LLAMA.format("user", "Half of ten?") + LLAMA.format("assistant", REPLY)
    },
    "templated for Gemma": {
        "text": f"<bos><start_of_turn>user\nHalf of ten?<end_of_turn>\n<start_of_turn>model\n{REPLY}<end_of_turn>\n"
    },
    "templated prompt that opens the thought": {
        "prompt": CHATML + "<think>\n",
        "completion": "Half of ten.\n</think>\nFive.<|im_end|>",
    },
    "templated prompt without a header": {
        "prompt": CHATML.removesuffix("<|im_start|>assistant\n"),
        "completion": REPLY,
    },
    "end of turn behind the reply": {"prompt": "Half of ten?", "completion": REPLY + "<|im_end|>\n<|endoftext|>"},
    "weight 1": turn(content=REPLY, weight=1),
    "rows of the hub's server": {"rows": [{"row_idx": 0, "row": {"prompt": "Half of ten?", "completion": REPLY}}]},
    "records by name": {"a1": {"prompt": "Half of ten?", "completion": REPLY}},
    "columns": {"prompt": ["Half of ten?"], "completion": [REPLY]},
    "columns by row number": {"prompt": {"0": "Half of ten?"}, "completion": {"0": REPLY}},
}


@pytest.mark.parametrize("record", SAME.values(), ids=SAME)
def test_the_same_trace_however_it_is_written(tmp_path: Path, record: Any) -> None:
    found = read(tmp_path, record)
    assert (found.roles, found.asked, found.cot, found.answer) == (["user"], "Half of ten?", "Half of ten.", "Five.")


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("two assistant turns", "consecutive assistant turns at the end are joined"),
        ("templated text", "text that was templated already"),
        ("templated prompt that opens the thought", "text that was templated already"),
        ("end of turn behind the reply", "an end-of-turn token"),
    ],
)
def test_what_was_done_is_noted(tmp_path: Path, name: str, note: str) -> None:
    (found,) = read(tmp_path, SAME[name]).notes
    assert found.startswith(note)


def test_instruction_and_input_are_one_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, {"instruction": "Halve it.", "input": "Ten", "output": REPLY}).asked == "Halve it.\n\nTen"


def test_developer_is_the_system(tmp_path: Path) -> None:
    record = {"messages": [{"role": "developer", "content": "Be brief."}, *turn(content=REPLY)["messages"]]}
    assert read(tmp_path, record).roles == ["system", "user"]
    assert read(tmp_path, {"system_prompt": "Be brief.", **turn(content=REPLY)}).roles == ["system", "user"]


REFUSED: dict[str, tuple[Any, str]] = {
    "different thoughts": (turn(content="Five.", thinking="a", reasoning="b"), "two thoughts: a turn holds different"),
    "thought of another type": (turn(content="Five.", thinking=["a"]), "thinking is not text: found list"),
    "less than no weight": (turn(content=REPLY, weight=-1), "weight of a turn is '-1', accepted are numbers of"),
    "tool turn": ({"messages": [ASK, {"role": "observation", "content": "x"}]}, "no assistant turn"),
    "tool call": (turn(content=None, tool_calls=[{"id": 1}]), "tool call without a name"),
    "no role": ({"messages": [{"content": "x"}, {"role": "assistant", "content": REPLY}]}, "unknown role: none among"),
    "image": (parts({"type": "image_url", "image_url": "x"}), "content is not text"),
    "two thoughts": (parts(text(REPLY), {"type": "thinking", "thinking": "x"}), "two thoughts: one under a key"),
    "half JSON text": ({"messages": '[{"role": "user"'}, "turns are not a list: found str"),
    "plain text": ({"text": "Half of ten? Five."}, "unknown format: the record's keys are text"),
    "preference pair": ({"prompt": "x", "chosen": REPLY, "rejected": "y"}, "no reply: the record holds a prompt only"),
    "nulls only": ({"messages": None, "prompt": None}, "unknown format: the record's keys are messages (null), prompt"),
    "several references": ({**turn(content=REPLY), "answer": ["4", "5"]}, "several references: a list of 2 different"),
    "reference of another type": ({**turn(content=REPLY), "answer": {"x": 1}}, "reference is not text: it is dict"),
    "verdict": ({**turn(content=REPLY), "correct": 2}, "verdict is not true, false or null: it is '2'"),
    "thought beside tags": ({"question": "x", "reasoning": "y", "answer": REPLY}, "two thoughts: one in reasoning"),
}


@pytest.mark.parametrize(("record", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_its_place_and_reason(tmp_path: Path, record: Any, reason: str) -> None:
    with pytest.raises(TraceFormatError) as caught:
        read(tmp_path, record)
    assert str(caught.value).startswith(f"{tmp_path / 'traces.jsonl'}:1: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "reference"),
    [
        ({"reference": "5"}, "5"),
        ({"expected_answer": 5}, "5"),
        ({"answer": ["5"]}, "5"),
        ({"answer": ["5", "5", None]}, "5"),
        ({"answer": True}, "True"),
        ({"reward_model": {"ground_truth": "5", "style": "rule"}}, "5"),
        ({"ground_truth": 5.5, "answer": "6"}, "5.5"),
        ({"solution": "Half of ten is 5."}, None),
        ({}, None),
    ],
)
def test_reference_of_a_chat(tmp_path: Path, columns: dict[str, Any], reference: str | None) -> None:
    assert read(tmp_path, {**turn(content=REPLY), **columns}).reference == reference


@pytest.mark.parametrize(("value", "correct"), [(1, True), (0, False), ("true", True), ("No", False), (None, None)])
def test_verdicts_are_flags_or_words(tmp_path: Path, value: Any, correct: bool | None) -> None:
    assert read(tmp_path, {**turn(content=REPLY), "correct": value}).correct is correct


def test_the_last_turn_that_is_trained_is_the_reply(tmp_path: Path) -> None:
    later = [{"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Bye", "weight": 0}]
    found = read(tmp_path, {"messages": [*turn(content=REPLY, weight=1)["messages"], *later]})
    assert (found.asked, found.answer) == ("Half of ten?", "Five.")
    assert found.notes == [
        "the last assistant turn is marked as not to train (weight 0 or train false); the one before it is taken"
    ]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_chat_without_a_turn_to_train_is_left_out(tmp_path: Path, mark: dict[str, Any]) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(turn(content=REPLY, **mark)) + "\n" + json.dumps(turn(content=REPLY)) + "\n")
    traces, counts = read_traces(TraceConfig(source=str(path)))
    assert (len(traces), counts.read, counts.skipped, counts.reasons) == (1, 2, 1, {})
    (line,) = counts.lines()
    assert line.startswith("1 of 2 replies: all assistant turns are marked as not to train")


def test_earlier_turns_and_unread_columns_are_told(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = {"messages": [*earlier, *turn(content=REPLY)["messages"]], "context": "c", "tags": ["x"], "id": None}
    path.write_text(json.dumps(chat) + "\n")
    _, counts = read_traces(TraceConfig(source=str(path)))
    assert counts.lines() == [
        "1 of 1 replies: earlier assistant turns are read as prompt and not trained",
        "columns that are no part of the text, with the replies that have them: context (1), tags (1)",
    ]


@pytest.mark.parametrize(
    ("record", "asked", "reference"),
    [
        ({"problem": "x?", "solution": "so \\boxed{4}", "answer": "4", "level": 3}, "x?", "4"),
        ({"prompt": "x?", "answer": "4"}, "x?", "4"),
        ({"question": "x?", "answer": "1 + 3\n#### 4"}, "x?", "4"),
        ({"messages": [{"role": "user", "content": "x?"}], "answer": 4}, "x?", "4"),
        (
            {"messages": [{"role": "user", "content": "x?"}, {"role": "assistant", "content": ""}], "answer": "4"},
            "x?",
            "4",
        ),
        ({"prompt": "x?", "completion": "<think>a</think>b<think>c</think>", "reference": "4"}, "x?", "4"),
        ({"prompt": [{"role": "user", "content": "x?"}], "reward_model": {"ground_truth": "4"}}, "x?", "4"),
    ],
)
def test_problems_need_no_reply(tmp_path: Path, record: Any, asked: str, reference: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (problem,), counts = read_problems(TraceConfig(source=str(path)))
    assert (problem.messages[-1]["content"], problem.reference) == (asked, reference)
    assert (counts.kept, counts.reasons) == (1, {})


@pytest.mark.parametrize("record", [None, 3, {}, {"answer": "4"}, {"messages": "x"}, {"messages": []}, {"prompt": 3}])
def test_records_without_a_prompt_are_no_problems(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(TraceFormatError, match=r"problems\.jsonl:1: "):
        read_problems(TraceConfig(source=str(path)))
