"""Many traces to samples: places of refusals, what is left out, and what surprises in how a tokenizer takes text."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_tokenizers import CHATML, byte_tokenizer
from tiny_runs import save_model

from limbeck.errors import ConfigError, TemplateError
from limbeck.traces.render import RenderConfig, lent_header, prompt_text, render
from limbeck.traces.rendering import fitting_prompts, notes_on, position_limit, render_traces
from limbeck.traces.trace import Trace

CONFIG = RenderConfig()
WITHOUT_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


def trace(number: int = 0, answer: str = "4", cot: str = "2 + 2 = 4", system: str | None = None) -> Trace:
    messages = [{"role": "user", "content": f"Sum {number}?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Trace(messages=tuple(messages), cot=cot, answer=answer, source=f"sums.jsonl:{number}")


def test_a_refusal_names_the_place_and_can_be_skipped() -> None:
    tokenizer = byte_tokenizer(NO_SYSTEM)
    traces = [trace(1), trace(2, system="Be brief."), trace(3)]
    with pytest.raises(
        TemplateError, match=r"sums\.jsonl:2: the chat template refuses the messages \(no system here\)"
    ):
        render_traces(traces, tokenizer, CONFIG)
    found = render_traces(traces, tokenizer, CONFIG, on_bad="skip")
    assert [sample.source for sample in found.samples] == ["sums.jsonl:1", "sums.jsonl:3"]
    assert found.dropped == {"messages that the chat template refuses": 1}
    assert found.notes == ["1 of 3 traces are left out: messages that the chat template refuses"]
    with pytest.raises(TemplateError, match="refuses the messages of all 1 traces"):
        render_traces([traces[1]], tokenizer, CONFIG, on_bad="skip")


def test_a_tokenizer_without_a_template_is_no_matter_of_one_trace() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"^the tokenizer has no chat template"):
        render_traces([trace()], tokenizer, CONFIG, on_bad="skip")


def test_long_traces_are_left_out_and_counted() -> None:
    tokenizer = byte_tokenizer()
    short, long = trace(1), trace(2, cot="so " * 100)
    limit = len(render(short, tokenizer, CONFIG))
    found = render_traces([short, long], tokenizer, CONFIG, limit)
    assert len(found.samples) == 1
    assert found.notes == [f"1 of 2 traces are left out: longer than {limit} tokens"]
    with pytest.raises(ConfigError, match="max_trace_tokens 5 leaves out all traces; the shortest has"):
        render_traces([short, long], tokenizer, CONFIG, 5)


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({"cot": "A turn ends with <|im_end|>."}, 1),
        ({"answer": "It is <|other_end|>, not <|im_end|>"}, 1),
        ({"answer": "It is <think>"}, 0),
        ({"answer": "It is <|unheard_of|>"}, 0),
    ],
)
def test_special_tokens_in_the_text_are_told(changed: dict[str, str], count: int) -> None:
    notes = notes_on([trace(1), trace(2, **changed)], byte_tokenizer(), CONFIG)
    assert len(notes) == count
    if count:
        assert notes[0].startswith("1 of 2 traces hold special tokens of the tokenizer as text (<|im_end|>")


def test_a_template_without_a_generation_prompt_lends_its_header() -> None:
    tokenizer = byte_tokenizer(WITHOUT_PROMPT)
    assert lent_header(tokenizer, CONFIG) == "<|im_start|>assistant\n"
    assert lent_header(byte_tokenizer(), CONFIG) == ""
    asked = [{"role": "user", "content": "Sum?"}]
    assert prompt_text(asked, tokenizer, CONFIG) == prompt_text(asked, byte_tokenizer(), CONFIG)
    (note,) = notes_on([trace()], tokenizer, CONFIG)
    assert note.startswith("the chat template has no generation prompt; the assistant's header of its whole chats")


def test_one_end_of_turn_is_written() -> None:
    tokenizer = byte_tokenizer()
    plain, ended = (render(trace(answer=answer), tokenizer, CONFIG).input_ids for answer in ("4", "4<|im_end|>"))
    assert plain.tolist() == ended.tolist()


@pytest.mark.parametrize(
    ("answer", "found"),
    [("The sum is \\boxed{4}.", True), ("4", True), ("The sum is 4.", False), ("\\boxed{5}", False)],
)
def test_the_first_derivation_is_that_of_the_boxed_answer(answer: str, found: bool) -> None:
    assert (render(trace(answer=answer), byte_tokenizer(), CONFIG).derivation_end is not None) is found


def test_prompts_that_leave_no_room_are_named_or_left_out(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert position_limit(model) == 1024
    long = Trace(messages=({"role": "user", "content": "1+" * 1024},), cot=None, answer=None, source="sums.jsonl:9")
    with pytest.raises(ConfigError, match=r"sums\.jsonl:9: the prompt has 20\d\d tokens; .* has 1024 positions"):
        fitting_prompts([trace(), long], model, CONFIG)
    kept, notes = fitting_prompts([trace(), long], model, CONFIG, "skip")
    assert (kept, len(notes)) == ([trace()], 1)
    assert notes[0].startswith("1 of 2 prompts are left out: longer than the 1024 positions")
    with pytest.raises(ConfigError, match="all 1 prompts have as many tokens"):
        fitting_prompts([long], model, CONFIG, "skip")
