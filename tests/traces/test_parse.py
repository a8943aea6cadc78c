"""Splitting replies, reading chats and columns: each accepted shape and each refusal with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import split_chat
from limbeck.traces.parse import detect, parse_record
from limbeck.traces.record import Parsed
from limbeck.traces.thought import QUOTED_END, Markers, Thought, split_thought

USER = {"role": "user", "content": "Q"}
GOOD = "<think>c</think>a"


def chat(reply: Any, *before: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*(before or (USER,)), {"role": "assistant", "content": reply}]}


def only(record: Any, format_name: str, markers: Markers | None = None) -> Parsed:
    (parsed,) = parse_record(record, format_name, markers)
    return parsed


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>c</think>a", Thought("c", "a")),
        ("  \n<think>\n\nc\n</think>\n\n\na\n", Thought("c", "a")),
        ("c</think>a", Thought("c", "a")),
        ("c<|end_of_thought|>a", Thought("c", "a")),
        ("<|begin_of_thought|>c<|end_of_thought|>a", Thought("c", "a")),
        (
            "<|begin_of_thought|>c<|end_of_thought|>\n<|begin_of_solution|>a\n<|end_of_solution|>\n",
            Thought("c", "a"),
        ),
        # The pair that opens the reply rules; the other one is quoted text.
        (
            "<think>c</think>write <|begin_of_thought|> and <|end_of_thought|>",
            Thought("c", "write <|begin_of_thought|> and <|end_of_thought|>"),
        ),
        (
            "<|begin_of_thought|>c<|end_of_thought|>close it with </think>",
            Thought("c", "close it with </think>"),
        ),
        ("<think>c</think>It is `</think>`.", Thought("c", "It is `</think>`.", notes=(QUOTED_END,))),
        ("<think>c", Thought("c", None, False, "missing end marker")),
        ("a", Thought(None, "a", problem="no thought")),
        ("<|begin_of_solution|>\na\n<|end_of_solution|>", Thought(None, "a", problem="no thought")),
        ("<think>\n\n</think>\n\na", Thought("", "a", problem="empty thought")),
        (
            "<|begin_of_thought|>c<|end_of_thought|><|begin_of_solution|>a",
            Thought("c", "a", problem="missing end of solution"),
        ),
    ],
)
def test_split_thought(reply: str, expected: Thought) -> None:
    found = split_thought(reply)
    reason = found.problem and found.problem.partition(":")[0]
    assert found._replace(problem=reason) == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("a</think>b<think>c", "markers exchanged"),
        ("<think>a</think>b<think>c</think>d", "two thoughts"),
        ("<think>a<think>b</think>c", "two thoughts"),
        ("a</think>b</think>c", "two thoughts"),
        ("Well, <think>a</think>b", "text before the thought"),
        ("Well, <think>a", "text before the thought"),
        ("<think>a</think>", "empty answer"),
        ("<think>a</think> \n\n ", "empty answer"),
        ("<think>", "empty reply"),
        (" \n", "empty reply"),
        ("<|begin_of_thought|>use <think><|end_of_thought|>a", "marker inside the thought"),
        (
            "<|begin_of_thought|>c<|end_of_thought|>x<|begin_of_solution|>a<|end_of_solution|>",
            "solution markers",
        ),
        (
            "<|begin_of_thought|>c<|end_of_thought|><|begin_of_solution|>a<|end_of_solution|>x",
            "text after the solution",
        ),
        ("<|begin_of_thought|>c<|end_of_thought|>a<|end_of_solution|>", "solution markers"),
        (
            "<|begin_of_thought|>c<|end_of_thought|><|begin_of_solution|> <|end_of_solution|>",
            "empty answer",
        ),
    ],
)
def test_split_thought_refuses(reply: str, reason: str) -> None:
    with pytest.raises(TraceFormatError, match=f"^{reason}"):
        split_thought(reply)


def test_custom_markers_replace_the_known_ones() -> None:
    markers = Markers("<reason>", "</reason>")
    assert split_thought("<reason>c</reason>a <think>", markers) == Thought("c", "a <think>")
    assert split_thought("<think>c</think>a", markers).problem == (
        "no thought: the reply does not hold <reason> ... </reason>; markers can name another pair"
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("text", "turns are not a list"),
        ({"role": ["user"]}, "turns are not a list"),
        ([], "no turns"),
        (["text"], "turn is not an object"),
        ([USER], "no assistant turn"),
        ([{"role": "assistant", "content": GOOD}], "no user turn"),
        ([{"role": "system", "content": "s"}, {"role": "assistant", "content": GOOD}], "no user turn"),
        ([USER, {"role": "assistant", "content": GOOD}, USER], "last turn not from the assistant"),
        ([USER, {"role": "judge", "content": "x"}, {"role": "assistant", "content": GOOD}], "unknown role"),
        ([USER, {"role": "tool", "content": "x"}, {"role": "assistant", "content": GOOD}], "tool answer without"),
        ([USER, {"content": GOOD}], "unknown role"),
        ([USER, {"role": 3, "content": GOOD}], "unknown role"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": GOOD}], "empty prompt"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": GOOD}], "no content"),
        ([USER, {"role": "assistant", "content": None}], "no content"),
        ([USER, {"role": "assistant"}], "no content"),
        ([USER, {"role": "assistant", "content": 7}], "content is not text"),
        ([USER, {"role": "assistant", "content": ["x"]}], "content is not text"),
        (
            [USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}],
            "content is not text",
        ),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "content is not text"),
        (
            [USER, {"role": "assistant", "content": "a", "reasoning_content": ["c"]}],
            "reasoning_content is not text",
        ),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}], "tool call without"),
    ],
)
def test_split_chat_refuses(turns: Any, reason: str) -> None:
    with pytest.raises(TraceFormatError, match=f"^{reason}"):
        split_chat(turns)


def test_separate_system_prompt_goes_first() -> None:
    record = {
        "system": "Think.",
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": GOOD}],
    }
    trace = only(record, "sharegpt").trace
    assert trace and [message["role"] for message in trace.messages] == ["system", "user"]
    assert trace.messages[0]["content"] == "Think."


@pytest.mark.parametrize("system", [None, "", " ", "Think."])
def test_system_prompt_is_not_repeated(system: str | None) -> None:
    record = {**chat(GOOD, {"role": "system", "content": "Think."}, USER), "system": system}
    trace = only(record, "messages").trace
    assert trace and [message["role"] for message in trace.messages] == ["system", "user"]


def test_two_different_system_prompts_are_refused() -> None:
    record = {**chat(GOOD, {"role": "system", "content": "Think."}, USER), "system": "Do not."}
    assert only(record, "messages").problem == "two system prompts: one among the turns, another beside them"


def test_earlier_reasoning_content_is_left_to_the_template() -> None:
    earlier = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
    trace = only(chat(GOOD, USER, earlier, USER), "messages").trace
    assert trace and trace.messages[1] == earlier


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_blank_reasoning_content_means_tags(empty: str | None) -> None:
    record = chat(GOOD)
    record["messages"][-1]["reasoning_content"] = empty
    assert only(record, "messages").problem is None


def test_reasoning_content_and_tags_together_are_refused() -> None:
    record = chat(GOOD)
    record["messages"][-1]["reasoning_content"] = "c"
    assert str(only(record, "messages").problem).startswith("two thoughts")


def test_answer_beside_reasoning_content_may_quote_the_markers() -> None:
    record = chat("Write </think> at its end.")
    record["messages"][-1]["reasoning_content"] = "c"
    parsed = only(record, "messages")
    assert parsed.problem is None and parsed.trace and parsed.trace.answer == "Write </think> at its end."


def test_openr1_row_gives_one_trace_a_generation() -> None:
    record = {
        "problem": "Q",
        "answer": "4",
        "solution": "long",
        "uuid": "u",
        "generations": [GOOD, "<think>cut", "<think>d</think>", "<think>e</think>5"],
        "correctness_math_verify": [True, False, True, None],
        "correctness_llama": [None, None, None, False],
    }
    parsed = parse_record(record, "columns")
    assert [str(p.problem).partition(":")[0] for p in parsed] == [
        "None",
        "missing end marker",
        "empty answer",
        "None",
    ]
    traces = [p.trace for p in parsed if p.trace]
    assert [trace.cot for trace in traces] == ["c", "cut", "e"]
    assert [trace.correct for trace in traces] == [True, False, False]
    assert {trace.reference for trace in traces} == {"4"}
    assert [trace.metadata for trace in traces] == [{"uuid": "u", "generation": index} for index in (0, 1, 3)]


def test_s1k_reads_reference_and_grade() -> None:
    record = {
        "question": "Q",
        "solution": "4",
        "deepseek_thinking_trajectory": "c",
        "deepseek_attempt": "a",
        "deepseek_grade": "No",
        "thinking_trajectories": ["other"],
        "attempt": "other",
        "source_type": "aime",
    }
    trace = only(record, "columns").trace
    assert trace and (trace.cot, trace.answer, trace.reference, trace.correct) == ("c", "a", "4", False)
    assert trace.metadata == {"source_type": "aime"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"generations": []}, "no generations"),
        ({"generations": GOOD}, "no generations"),
        ({"correctness_math_verify": [True, False]}, "unequal lists"),
        ({"correctness_math_verify": ["perhaps"]}, "flag is not true, false or null"),
        ({"problem": None}, "missing field"),
        ({"problem": 4}, "content is not text"),
        ({"answer": ["4", "5"]}, "several references"),
        ({"answer": {"value": 4, "ground_truth": {}}}, "reference is not text"),
        ({"generations": [None]}, "no content"),
    ],
)
def test_columns_refuse(change: dict[str, Any], reason: str) -> None:
    record = {
        "problem": "Q",
        "answer": "4",
        "generations": [GOOD],
        "correctness_math_verify": [True],
    } | change
    assert str(only(record, "columns").problem).startswith(reason)


def test_lists_of_thoughts_and_answers_must_pair() -> None:
    record = {"question": "Q", "thinking_trajectories": ["c", "d"], "attempt": ["a", "b"]}
    assert [p.trace.cot for p in parse_record(record, "columns") if p.trace] == ["c", "d"]
    assert str(only({**record, "attempt": "a"}, "columns").problem).startswith("unequal lists: 2 of")


@pytest.mark.parametrize(("value", "reference"), [("18", "18"), ("1,080", "1080"), ("$12.50", "12.50"), ("-3", "-3")])
def test_gsm8k(value: str, reference: str) -> None:
    trace = only({"question": "Q", "answer": f"9 * 2 = <<9*2=18>>18\n#### {value}"}, "gsm8k").trace
    assert trace and (trace.cot, trace.answer, trace.reference) == ("9 * 2 = <<9*2=18>>18", value, reference)


def test_gsm8k_without_hashes_ends_inside_the_thought() -> None:
    parsed = only({"question": "Q", "answer": "9 * 2 = 18"}, "gsm8k")
    assert str(parsed.problem).startswith("missing end marker")
    assert parsed.trace and (parsed.trace.cot, parsed.trace.answer) == ("9 * 2 = 18", None)


@pytest.mark.parametrize(
    ("ending", "correct"), [("#### 16", True), ("#### 16.0", True), ("#### 17", False), ("", None)]
)
def test_reasoning_gym_keeps_the_official_answer(ending: str, correct: bool | None) -> None:
    record = {
        "question": "Q",
        "answer": "16",
        "metadata": {"answer_cot": f"8 * 2 {ending}", "source_index": 3},
    }
    trace = only(record, "reasoning_gym").trace
    assert trace and (trace.cot, trace.answer, trace.reference, trace.correct) == (
        "8 * 2",
        "16",
        "16",
        correct,
    )
    assert trace.metadata == {"source_index": 3}


def test_reasoning_gym_task_without_solution_has_no_thought() -> None:
    record = {"question": "Q", "answer": "16", "metadata": {"source_dataset": "chain_sum"}}
    parsed = only(record, "reasoning_gym")
    assert parsed.problem == "no thought: the task 'chain_sum' carries no worked solution, gsm_symbolic does"
    assert parsed.trace and parsed.trace.cot is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"limbeck_trace": 2}, "unknown version"),
        ({"limbeck_trace": "[" * 3000}, "unknown version: limbeck_trace is '[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[['"),
        ({"answr": "a"}, "unknown key"),
        ({"cot": 3}, "wrong type: cot"),
        ({"correct": "yes"}, "wrong type: correct"),
        ({"messages": "Q"}, "wrong type: messages"),
        ({"messages": []}, "no user turn"),
        ({"answer": None}, "empty answer"),
        ({"answer": " "}, "empty answer"),
        ({"cot_closed": False}, "answer after an open thought"),
        ({"cot_closed": False, "answer": None, "cot": ""}, "empty reply"),
        ({"cot_closed": False, "answer": None, "cot": None}, "no reply"),
        ({"cot": None}, "no thought"),
        ({"cot": "a </think> b"}, "marker inside the thought"),
    ],
)
def test_own_format_refuses(change: dict[str, Any], reason: str) -> None:
    record = {"limbeck_trace": 1, "messages": [USER], "cot": "c", "answer": "a"} | change
    assert str(only(record, "limbeck").problem).startswith(reason)


@pytest.mark.parametrize("place", ["Q", "reply", "metadata"])
def test_half_a_surrogate_pair_is_refused(place: str) -> None:
    record: dict[str, Any] = {"prompt": "Q", "completion": GOOD, "id": "x"}
    record[{"Q": "prompt", "reply": "completion", "metadata": "id"}[place]] += "\ud83d"
    assert str(only(record, "prompt_completion").problem).startswith("not valid Unicode")


def test_plain_columns_become_metadata() -> None:
    record = {
        **chat(GOOD),
        "id": 7,
        "difficulty": float("nan"),
        "tags": ["x"],
        "reference": 4,
        "correct": True,
    }
    trace = only(record, "messages").trace
    assert trace and trace.metadata == {"id": 7}
    assert (trace.reference, trace.correct) == ("4", True)


@pytest.mark.parametrize(
    ("record", "reference"),
    [
        ({"prompt": "Q", "reference": 4}, "4"),
        ({"question": "Q"}, None),
        ({"messages": [{"role": "user", "content": "Q"}]}, None),
        ({"conversations": [{"from": "human", "value": "Q"}], "reference": "4"}, "4"),
        ({"prompt": [{"role": "user", "content": "Q"}], "level": 3}, None),
    ],
)
def test_prompts_without_a_reply(record: dict[str, Any], reference: str | None) -> None:
    assert detect(record) == "prompts"
    parsed = only(record, "prompts")
    assert parsed.problem and parsed.problem.startswith("no reply: the record holds a prompt only")
    assert ("reference: read as its reference" in parsed.problem) == (reference is not None)
    assert parsed.trace and parsed.trace.messages[-1] == {"role": "user", "content": "Q"}
    assert (parsed.trace.cot, parsed.trace.answer, parsed.trace.reference) == (None, None, reference)
    assert parsed.trace.metadata == ({"level": 3} if "level" in record else {})


def test_an_answer_without_a_thought_is_a_reference() -> None:
    record = {"problem": "Q", "answer": "4"}
    assert detect(record) == "prompts"
    trace = only(record, "prompts").trace
    assert trace and trace.reference == "4"
    reply = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert detect(reply) == "messages"
    assert "prompt does not end with the user" in str(only(reply, "prompts").problem)


def test_detect_names_formats_and_keys() -> None:
    with pytest.raises(TraceFormatError) as caught:
        detect({"ask": "Q", "say": "A", "messages": None})
    message = str(caught.value)
    assert message.startswith("unknown format: the record's keys are ask, say, messages (null); known formats are lim")
    assert "sharegpt" in message and "fields" in message
    with pytest.raises(TraceFormatError, match="not an object: the record is list"):
        detect([1])


def test_own_format_without_a_thought_has_no_thought() -> None:
    parsed = only({"limbeck_trace": 1, "messages": [USER], "answer": "a"}, "limbeck")
    assert str(parsed.problem).startswith("no thought") and parsed.trace and parsed.trace.cot is None
