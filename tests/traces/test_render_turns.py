"""Agents' traces: what the model wrote and no more is trained, behind what it was given, in five templates' forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from agent_templates import FAMILIES, QWEN3
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import CHATML, byte_tokenizer
from tiny_runs import run_config

from limbeck.config import build
from limbeck.distill.data import prepare
from limbeck.errors import ConfigError, TemplateError, TraceFormatError
from limbeck.traces.batch import make_example
from limbeck.traces.render import MessagesRefused, RenderConfig, prompt_text, render
from limbeck.traces.render_turns import samples_of
from limbeck.traces.sample import ANSWER, COT, PROMPT
from limbeck.traces.show import trace_text, view_cut
from limbeck.traces.sources import TraceConfig, read_problems, read_traces
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import from_json, to_json
from limbeck.traces.truncate import TruncationConfig, apply_cut, truncate

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
RECORD = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "Is it cold in Oslo?"},
        {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": '3 "degrees"'},
        {"role": "assistant", "content": "<think>\nThree is cold.\n</think>\n\nYes, it is."},
        {"role": "user", "content": "And in Rome?"},
        {"role": "assistant", "content": "I do not know.", "reasoning_content": "Not asked yet."},
    ],
}
THINK = "<think>\n{}\n</think>\n\n".format
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
HARMONY_CALL = "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{}<|call|>".format(
    '{"city": "Oslo"}'
)
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
GLM_CALL = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>"
ANALYSIS = "<|channel|>analysis<|message|>{}<|end|>".format
FINAL = "<|start|>assistant<|channel|>final<|message|>{}<|return|>".format
WRITTEN = {
    "qwen3": [
        [(THINK("I must look."), QWEN_CALL), (THINK("Three is cold."), "Yes, it is.<|im_end|>")],
        [(THINK("Not asked yet."), "I do not know.<|im_end|>")],
    ],
    "harmony": [
        [(ANALYSIS("I must look."), HARMONY_CALL), (ANALYSIS("Three is cold."), FINAL("Yes, it is."))],
        [(ANALYSIS("Not asked yet."), FINAL("I do not know."))],
    ],
    "llama3": [
        [(THINK("I must look."), '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>')],
        [(THINK("Three is cold."), "Yes, it is.<|eot_id|>")],
        [(THINK("Not asked yet."), "I do not know.<|eot_id|>")],
    ],
    "deepseek": [
        [(THINK("I must look."), DEEPSEEK_CALL)],
        [(THINK("Three is cold."), "Yes, it is.<｜end▁of▁sentence｜>")],
        [(THINK("Not asked yet."), "I do not know.<｜end▁of▁sentence｜>")],
    ],
    "glm": [
        [("\n<think>I must look.</think>\n", GLM_CALL), ("\n<think>Three is cold.</think>\n", "Yes, it is.<|user|>")],
        [("\n<think>Not asked yet.</think>\n", "I do not know.<|endoftext|>")],
    ],
}
"""Thought and answer of every turn in every sequence, as the family's model writes them."""


def read(tmp_path, record, **fields):
    (tmp_path / "t.jsonl").write_text(json.dumps(record), encoding="utf-8")
    return read_traces(build(TraceConfig, {"source": str(tmp_path / "t.jsonl"), **fields}))


def trace_of(tmp_path, record=RECORD, **fields):
    return read(tmp_path, record, **fields)[0][0]


def without_tools(name):
    return {key: RECORD[key] for key in RECORD if name != "deepseek" or key != "tools"}


def rendered(tmp_path, name, record=None, **fields):
    family = FAMILIES[name]
    config = RenderConfig(start_marker=family.markers[0], end_marker=family.markers[1])
    tokenizer = family.tokenizer()
    trace = trace_of(tmp_path, record or without_tools(name), **fields)
    return samples_of(trace, tokenizer, config), tokenizer, config, trace


def turns_of(sample, tokenizer):
    """Thought and answer of each stretch that is no prompt."""
    segments, found = sample.segment_ids, []
    for index, segment in enumerate(segments):
        if segment == PROMPT:
            continue
        if index == 0 or segments[index - 1] == PROMPT or (segment == COT and segments[index - 1] == ANSWER):
            found.append({COT: [], ANSWER: []})
        found[-1][int(segment)].append(int(sample.input_ids[index]))
    return [tuple(tokenizer.decode(turn[segment]) for segment in (COT, ANSWER)) for turn in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_model_wrote_is_trained_as_it_wrote_it(tmp_path, name):
    samples, tokenizer, config, trace = rendered(tmp_path, name)
    assert [turns_of(sample, tokenizer) for sample in samples] == WRITTEN[name]
    headers = [
        prompt_text([{**m, "thinking": m.get("reasoning_content")} for m in messages], tokenizer, config, trace.tools)
        for messages in (trace.messages[:1], trace.messages[:3], trace.messages)
    ]
    for sample in samples:
        text = tokenizer.decode(sample.input_ids.tolist())
        turns = sample.turns or (None,)
        for turn, header in zip(turns, headers[: len(turns)], strict=True):
            assert text.startswith(header)
            given = tokenizer(header, add_special_tokens=False).input_ids
            assert sample.input_ids[: len(given)].tolist() == given
            assert turn is None or turn.start <= len(given) < turn.ending
        headers = headers[len(turns) :]
    assert samples[-1].ending_start < len(samples[-1]) and samples[-1].has_end_marker


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_tools_and_words_of_users_carry_no_loss(tmp_path, name):
    samples, tokenizer, *_ = rendered(tmp_path, name)
    for sample in samples:
        example = make_example(sample, TruncationConfig(), SupervisionConfig())
        trained = tokenizer.decode(sample.input_ids[example.ce_weight > 0].tolist())
        assert "degrees" not in trained and "Rome" not in trained and "cold in" not in trained
        assert np.array_equal(example.ce_weight > 0, sample.segment_ids != PROMPT)


def test_which_turns_are_trained(tmp_path):
    tokenizer = FAMILIES["qwen3"].tokenizer()
    last = trace_of(tmp_path, turns="last")
    assert last.turn_weights == () and len(samples_of(last, tokenizer, RenderConfig())) == 1
    chat = {"messages": [m for m in RECORD["messages"] if m["role"] != "tool" and "tool_calls" not in m]}
    plain, counts = read(tmp_path, chat)
    assert plain[0].turn_weights == () and any("earlier assistant turns" in note for note in counts.notes)
    both, counts = read(tmp_path, chat, turns="all")
    assert both[0].turn_weights == (1.0, 1.0) and not counts.notes
    assert [len(s.turns) for s in samples_of(both[0], tokenizer, RenderConfig())] == [0, 0]
    assert both[0].prompt_key != plain[0].prompt_key and both[0].opening == both[0].messages[:1]


def test_a_turn_weighs_what_it_is_marked_with(tmp_path):
    marked = json.loads(json.dumps(RECORD))
    marked["messages"][1]["weight"], marked["messages"][5]["train"] = 0.5, False
    samples, tokenizer, *_ = rendered(tmp_path, "qwen3", marked)
    (sample,) = samples
    assert [turn.weight for turn in sample.turns] == [0.5, 1.0]
    example = make_example(sample, TruncationConfig(), SupervisionConfig(preset="answer"))
    first, second = sample.turns
    assert set(example.ce_weight[first.start : first.stop]) == {0.0, 0.5}
    assert set(example.ce_weight[second.start : second.stop]) == {0.0, 1.0}
    assert example.ce_weight[first.stop : second.start].sum() == 0
    none = json.loads(json.dumps(RECORD))
    none["messages"][1]["weight"] = 0
    assert [turns_of(s, tokenizer) for s in rendered(tmp_path, "qwen3", none)[0]] == [
        [WRITTEN["qwen3"][0][1]],
        WRITTEN["qwen3"][1],
    ]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["1/4", "1/2", "3/4"]), st.sampled_from(["lead", "tail", "middle"]), st.booleans())
def test_every_turn_is_cut(tmp_path_factory, fraction, policy, mask_only):
    sample = rendered(tmp_path_factory.mktemp("t"), "qwen3")[0][0]
    config = TruncationConfig(policy=policy, lead_fraction=fraction, unit="cot", keep_ending=True, mask_only=mask_only)
    cut = truncate(sample, config)
    trained = np.zeros(len(sample), dtype=bool)
    trained[cut.kept[cut.supervised]] = True
    assert len(cut.kept) == len(sample) or not mask_only
    for turn in sample.turns:
        cot = turn.start + np.flatnonzero(sample.segment_ids[turn.start : turn.stop] == COT)
        own = trained[cot]
        alone = truncate(
            sample.__class__(  # the same thought as a trace of its own
                input_ids=sample.input_ids[cot],
                segment_ids=np.full(len(cot), COT, dtype=np.int8),
                ending_start=turn.ending - turn.start,
                trace_key=sample.trace_key,
            ),
            config,
        )
        expected = np.zeros(len(cot), dtype=bool)
        expected[alone.kept[alone.supervised]] = True
        assert np.array_equal(own, expected)
        assert trained[turn.ending : turn.stop].all()
    assert trained[sample.segment_ids != COT].all()
    left = apply_cut(sample, cut)
    for before, after in zip(sample.turns, left.turns, strict=True):
        assert (
            left.input_ids[after.ending : after.stop].tolist() == sample.input_ids[before.ending : before.stop].tolist()
        )


def test_cuts_that_would_lose_turns_are_refused(tmp_path):
    sample = rendered(tmp_path, "qwen3")[0][0]
    with pytest.raises(ConfigError, match="keep_ending or mask_only"):
        truncate(sample, TruncationConfig(lead_fraction=0.5, unit="response"))
    assert len(truncate(sample, TruncationConfig(lead_fraction=0.5)).kept) == len(sample) // 2


def test_calls_as_sharegpt_and_the_older_api_write_them(tmp_path):
    sharegpt = {
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "Is it cold in Oslo?"},
            {"from": "gpt", "value": "<think>I must look.</think>"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": {"degrees": 3}},
            {"from": "gpt", "value": "<think>Three is cold.</think>Yes, it is."},
        ],
    }
    samples, tokenizer, _, trace = rendered(tmp_path, "qwen3", sharegpt)
    assert [turns_of(sample, tokenizer) for sample in samples] == [WRITTEN["qwen3"][0]]
    assert trace.messages[2]["content"] == '{"degrees": 3}'
    older = json.loads(json.dumps(RECORD))
    older["functions"] = [tool["function"] for tool in older.pop("tools")]
    older["messages"][1]["function_call"] = older["messages"][1].pop("tool_calls")[0]["function"]
    older["messages"][2] = {"role": "function", "name": "weather", "content": "3"}
    assert [turns_of(s, tokenizer) for s in rendered(tmp_path, "qwen3", older)[0]] == WRITTEN["qwen3"]


def test_several_calls_and_a_reply_that_only_calls(tmp_path):
    two = [{**CALL, "id": "c2"}, {"function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    record = {
        "tools": TOOLS,
        "messages": [RECORD["messages"][0], {"role": "assistant", "content": "", "tool_calls": two}],
    }
    samples, tokenizer, _, trace = rendered(tmp_path, "qwen3", record)
    assert trace.answer == "" and len(trace.tool_calls) == 2 and trace.turn_weights == ()
    ((cot, answer),) = turns_of(samples[0], tokenizer)
    assert cot == "" and answer.count("<tool_call>") == 2 and answer.endswith("</tool_call><|im_end|>")
    with pytest.raises(MessagesRefused, match="only single tool-calls"):
        rendered(tmp_path, "llama3", record)


def test_a_trace_survives_its_file(tmp_path):
    trace = trace_of(tmp_path)
    assert from_json(json.loads(to_json(trace))) == trace
    again = read(tmp_path, json.loads(to_json(trace)))[0][0]
    assert again.key == trace.key and again.turn_weights == (1.0, 1.0, 1.0)


REFUSED = {
    "drops the tool weather": ("deepseek", RECORD),
    "drops the text of turn 1": (
        "llama3",
        {"messages": [{**m, "content": m["content"] or "Wait."} for m in RECORD["messages"]]},
    ),
    "Cannot pass both content and thinking": (
        "harmony",
        {"messages": [{**m, "content": m["content"] or "Wait."} for m in RECORD["messages"]]},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_template_leaves_out_is_refused(tmp_path, reason):
    with pytest.raises(MessagesRefused, match=reason):
        rendered(tmp_path, *REFUSED[reason])


def test_templates_without_a_place_for_calls_are_refused(tmp_path):
    record = {"messages": RECORD["messages"]}
    trace = trace_of(tmp_path, record)
    with pytest.raises(MessagesRefused, match="drops a call of turn 1"):
        samples_of(trace, byte_tokenizer(CHATML), RenderConfig())
    silent = QWEN3.replace("{{ m.content }}\n</tool_response>", "</tool_response>")
    with pytest.raises(MessagesRefused, match="drops message 2, of the tool"):
        samples_of(trace, byte_tokenizer(silent), RenderConfig())
    tokenizer = FAMILIES["harmony"].tokenizer()
    with pytest.raises(MessagesRefused, match=r"set render\.start_marker"):
        samples_of(trace, tokenizer, RenderConfig())
    with pytest.raises(TemplateError, match="a prompt and one reply"):
        render(trace, tokenizer, RenderConfig())


def test_commands_that_answer_prompts_refuse_tools(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(RECORD), encoding="utf-8")
    with pytest.raises(TraceFormatError, match="prompts with tools"):
        read_problems(TraceConfig(source=str(tmp_path / "t.jsonl")))


def test_a_run_trains_on_all_turns(tmp_path):
    records = []
    for number in range(4):
        record = json.loads(json.dumps(RECORD))
        record["messages"][0]["content"] = f"Is it cold in Oslo, asks number {number}?"
        records.append(json.dumps(record))
    (tmp_path / "t.jsonl").write_text("\n".join(records), encoding="utf-8")
    config = run_config({"traces": {"source": str(tmp_path / "t.jsonl")}, "num_validation": 1})
    data = prepare(config, FAMILIES["qwen3"].tokenizer())
    assert [len(example.sample.turns) for example in data.train] == [2, 0] * 3
    assert any("3 of 3 traces are several sequences (3 more)" in note for note in data.notes)


def test_turns_are_shown_with_their_segments(tmp_path):
    samples, tokenizer, *_ = rendered(tmp_path, "qwen3")
    text = trace_text(view_cut(samples[0], TruncationConfig(), SupervisionConfig()), tokenizer)
    assert [text.plain.count(f"[{name}]") for name in ("prompt", "cot", "answer")] == [2, 2, 2]
    styles = {str(span.style).split()[-1] for span in text.spans}
    assert {"cyan", "yellow", "green"} <= styles
