"""What `limbeck traces show` prints and what `limbeck traces stats` counts."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from made_tokenizers import byte_tokenizer, metaspace_tokenizer
from rich.console import Console

from limbeck.errors import ConfigError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces import show, stats
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.sources import TraceConfig
from limbeck.traces.supervise import SegmentWeights, SupervisionConfig
from limbeck.traces.synthetic import DERIVATION_PATTERN
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

TRACE = Trace(
    messages=({"role": "user", "content": "2+2 [bold]"},), cot="so 4, 漢", answer="4", reference="4", source="file:1"
)
HEADER = "[prompt] <|im_start|>user\n2+2 [bold]<|im_end|>\n<|im_start|>assistant\n"


def plain(*renderables) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    for renderable in renderables:
        console.print(renderable, soft_wrap=True)
    return out.getvalue()


def view(tokenizer=None, trace: Trace = TRACE, supervision: SupervisionConfig | None = None, **cut) -> show.CutView:
    sample = render(trace, tokenizer or byte_tokenizer(), RenderConfig())
    return show.view_cut(sample, TruncationConfig(**cut), supervision or SupervisionConfig())


def test_the_text_of_a_whole_trace_is_labelled():
    text = show.trace_text(view(), byte_tokenizer())
    assert text.plain == HEADER + "[cot] <think>\nso 4, 漢\n</think>\n\n[answer] 4<|im_end|>"
    styles = {str(span.style) for span in text.spans}
    assert {"cyan", "yellow", "green"} <= styles and not any("strike" in style for style in styles)


def test_the_cut_is_marked_and_what_it_drops_is_struck_through():
    tokenizer = byte_tokenizer()
    cut = view(tokenizer, policy="first_derivation")
    text = show.trace_text(cut, tokenizer)
    assert text.plain == HEADER + "[cot] <think>\nso 4 | cut here | , 漢\n</think>\n\n[answer] 4<|im_end|>"
    struck = [text.plain[span.start : span.end] for span in text.spans if "strike" in str(span.style)]
    assert "".join(struck) == ", 漢\n</think>\n\n4<|im_end|>"


def test_a_kept_ending_and_a_masked_loss_have_marks_of_their_own():
    tokenizer = byte_tokenizer()
    text = show.trace_text(view(tokenizer, policy="first_derivation", keep_ending=True), tokenizer).plain
    assert text.endswith("so 4 | cut here | , 漢\n | loss and text go on here | </think>\n\n[answer] 4<|im_end|>")
    text = show.trace_text(view(tokenizer, policy="first_derivation", mask_only=True), tokenizer).plain
    assert "so 4 | loss cut here, text stays | , 漢" in text


def test_the_text_keeps_its_spaces_and_cannot_steer_the_terminal():
    tokenizer = metaspace_tokenizer()
    trace = Trace(messages=({"role": "user", "content": "a"},), cot="b c", answer="d")
    assert "b c" in show.trace_text(view(tokenizer, trace), tokenizer).plain
    trace = Trace(messages=TRACE.messages, cot="\x1b[31m\x07x", answer="4")
    text = show.trace_text(view(trace=trace), byte_tokenizer()).plain
    assert "\\x1b[31m\\x07x" in text and "\x1b" not in text


def test_the_legend_counts_tokens_and_names_weights():
    supervision = SupervisionConfig(preset="cot+answer", kd=SegmentWeights(cot=0.5))
    cut = view(supervision=supervision, policy="first_derivation")
    rows = {line.split()[0]: line.split()[1:] for line in plain(show.segment_table(cut, supervision)).splitlines()}
    sample = cut.sample
    count = {i: int(np.sum(sample.segment_ids == i)) for i in (PROMPT, COT, ANSWER)}
    kept = sample.derivation_end - count[PROMPT]
    assert rows["prompt"][0] == rows["prompt"][2] == str(count[PROMPT]) and rows["prompt"][3:] == ["0", "0", "0", "0"]
    assert rows["cot"] == [
        str(count[COT]),
        f"{count[COT] / len(sample):.3f}",
        str(kept),
        "1",
        str(kept),
        "0.5",
        str(kept),
    ]
    assert rows["answer"] == ["2", f"{2 / len(sample):.3f}", "0", "1", "0", "0", "0"]


def test_landmarks_say_where_they_stand_and_whether_they_are_lost():
    cut = view(policy="first_derivation")
    end, length = cut.sample.derivation_end, len(cut.sample)
    text = show.landmarks(cut).plain
    assert f"tokens: {length}, kept {end} ({end / length:.3f}), dropped {length - end}" in text
    assert f"first derivation: token {end - 1} of {length} ({end / length:.3f}), kept" in text
    assert f"end marker: token {cut.sample.ending_start} of {length}" in text and text.endswith("lost")
    opened = view(trace=Trace(messages=TRACE.messages, cot="so 5", answer=None, cot_closed=False))
    assert show.landmarks(opened).plain.splitlines()[1:] == ["first derivation: not found", "ending: missing"]
    masked = show.landmarks(view(policy="first_derivation", mask_only=True)).plain
    assert masked.endswith("kept without loss") and "dropped 0" in masked


def test_the_token_table_has_a_line_a_token():
    tokenizer = byte_tokenizer()
    cut = view(tokenizer, policy="first_derivation")
    lines = plain(show.token_table(cut, tokenizer)).splitlines()[1:]
    assert len(lines) == len(cut.sample)
    assert lines[0].split() == ["0", "1", "'<|im_start|>'", "prompt", "kept", "0", "0"]
    assert lines[-1].split()[-4:] == ["answer", "dropped", "0", "0"]
    assert lines[cut.sample.derivation_end - 1].split()[2:] == ["'4'", "cot", "kept", "1", "1"]


@pytest.fixture
def symbols(monkeypatch):
    for module in (show, stats):
        monkeypatch.setattr(module, "load_tokenizer", lambda name: symbol_tokenizer())


CHAIN = TraceConfig(source="builtin:chain", num_traces=5, seed=1)


def test_show_prints_the_traces_asked_for(symbols, capsys):
    show.run(show.ShowConfig(traces=CHAIN, tokenizer="any", num=2, start=1, show_tokens=True))
    out = capsys.readouterr().out
    assert "trace 1 · builtin:chain seed 1 number 1" in out and "trace 2 ·" in out
    assert "trace 0" not in out and "trace 3" not in out
    assert out.count("[prompt]") == out.count("[cot]") == out.count("[answer]") == 2
    assert "\x1b" not in out and "reference" in out and "'</think>'" in out


def test_show_says_when_there_are_too_few_traces(symbols):
    with pytest.raises(ConfigError, match="start: 5; builtin:chain has 5 traces"):
        show.run(show.ShowConfig(traces=CHAIN, tokenizer="any", start=5))
    for fields in ({"num": 0}, {"start": -1}):
        with pytest.raises(ConfigError, match="expected"):
            show.ShowConfig(traces=CHAIN, tokenizer="any", **fields)


def sample(prompt: int, thought: int, marker: int, answer: int, derivation: int | None = None) -> Sample:
    length = prompt + thought + marker + answer
    return Sample(
        input_ids=np.zeros(length, dtype=np.int32),
        segment_ids=np.repeat(np.array([PROMPT, COT, ANSWER], dtype=np.int8), [prompt, thought + marker, answer]),
        ending_start=prompt + thought if marker or answer else length,
        derivation_end=derivation,
    )


SAMPLES = [sample(2, 4, 2, 2, derivation=5), sample(4, 10, 2, 4, derivation=6), sample(5, 5, 0, 0), sample(6, 0, 0, 4)]


def test_lengths_and_shares():
    result = stats.trace_stats(SAMPLES, TruncationConfig())
    assert result["num_traces"] == 4
    assert result["tokens"] == {"total": 50, "mean": 12.5, "median": 10.0, "p95": pytest.approx(18.5), "max": 20}
    segments = result["segments"]
    assert [segments[name]["mean_tokens"] for name in ("prompt", "cot", "answer")] == [17 / 4, 23 / 4, 10 / 4]
    assert sum(row["token_fraction"] for row in segments.values()) == pytest.approx(1)
    assert segments["answer"]["mean_fraction"] == pytest.approx((0.2 + 0.2 + 0 + 0.4) / 4)
    assert result["first_derivation"] == {
        "found_fraction": 0.5,
        "mean_position": pytest.approx(0.4),
        "median_position": pytest.approx(0.4),
    }


def test_an_uncut_trace_loses_nothing():
    losses = stats.cut_losses(SAMPLES, TruncationConfig())
    assert losses == {"kept_tokens": 50, **dict.fromkeys(stats.LOSSES, 0.0)}


@pytest.mark.parametrize(
    ("fraction", "marker", "answer", "turn_end", "derivation"),
    [
        ("0.95", 0, 0, 1, 0),
        ("0.8", 0, 1, 1, 0),
        ("0.7", 1, 1, 1, 0),
        ("0.5", 1, 1, 1, 0),
        ("0.4", 1, 1, 1, 0.5),
        ("0.2", 1, 1, 1, 1),
    ],
)
def test_what_a_cut_loses(fraction, marker, answer, turn_end, derivation):
    losses = stats.cut_losses(SAMPLES, TruncationConfig(lead_fraction=fraction))
    assert losses["lost_end_marker_fraction"] == marker
    assert losses["lost_answer_fraction"] == answer
    assert losses["lost_end_of_turn_fraction"] == turn_end
    assert losses["lost_first_derivation_fraction"] == derivation


def test_half_a_marker_is_a_lost_marker():
    losses = stats.cut_losses([SAMPLES[0]], TruncationConfig(lead_fraction="0.7"))
    assert losses["lost_end_marker_fraction"] == 1.0


def test_the_mask_only_twin_loses_the_same_and_a_kept_ending_only_the_middle():
    dropped, masked = (
        stats.cut_losses(SAMPLES, TruncationConfig(lead_fraction=0.4, mask_only=mask)) for mask in (False, True)
    )
    assert dropped == masked
    assert dropped["kept_tokens"] == 4 + 8 + 4 + 4 and dropped["lost_token_fraction"] == pytest.approx(0.6)
    ending = stats.cut_losses(SAMPLES, TruncationConfig(lead_fraction=0.4, keep_ending=True))
    assert ending["lost_end_marker_fraction"] == ending["lost_answer_fraction"] == 0
    assert ending["lost_first_derivation_fraction"] == 0.5


def test_shares_of_nothing_are_none():
    result = stats.trace_stats([sample(5, 5, 0, 0)], TruncationConfig(lead_fraction=0.5))
    assert result["cut"]["lost_end_marker_fraction"] is None and result["cut"]["lost_answer_fraction"] is None
    assert result["first_derivation"]["mean_position"] is None
    out = io.StringIO()
    stats.print_stats(result, Console(file=out, width=100))
    assert " - " in out.getvalue()


@pytest.mark.parametrize("policy", ["lead", "tail", "budget", "first_derivation"])
def test_the_table_of_lead_fractions_goes_with_every_policy(policy):
    budget = 5 if policy == "budget" else None
    cut = TruncationConfig(policy=policy, budget_tokens=budget, unit="response")
    rows = stats.trace_stats(SAMPLES, cut)["lead_fractions"]
    assert [row["lead_fraction"] for row in rows] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    kept = [row["kept_tokens"] for row in rows]
    assert kept == sorted(kept) and kept[0] > 17 and kept[-1] == 50
    assert rows[0]["lost_end_of_turn_fraction"] == (0 if policy == "tail" else 1)


def test_stats_prints_tables_and_returns_json(symbols, capsys):
    config = stats.StatsConfig(
        traces=CHAIN,
        tokenizer="any",
        render=RenderConfig(derivation_pattern=DERIVATION_PATTERN),
        truncation=TruncationConfig(policy="first_derivation"),
    )
    result = stats.run(config)
    stats.print_stats(result, Console())
    out = capsys.readouterr().out
    assert json.loads(json.dumps(result)) == result
    assert result["read"]["kept"] == result["selected"]["kept"] == result["num_traces"] == 5
    assert result["cut"]["truncation"]["policy"] == "first_derivation"
    assert result["cut"]["lost_first_derivation_fraction"] == 0 and result["cut"]["lost_answer_fraction"] == 1
    for text in (
        "5 traces",
        "prompt",
        "first derivation found in 1.000",
        "lead 0.1",
        "lead 1",
        "this cut",
        "end marker",
    ):
        assert text in out
    assert "\x1b" not in out
