"""Before the first step: does the pair read the same tokens, and can the student learn to stop?

What cannot work is refused with one line that names the field to set; what works but surprises is noted on the console
and in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.distill.config import DistillConfig, teachers_of
from limbeck.errors import PairError, TemplateError
from limbeck.models.anatomy import causal_lm_of
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.models.parts import text_config
from limbeck.progress import console
from limbeck.traces.batch import Example
from limbeck.traces.render import RenderConfig, stop_ids
from limbeck.traces.render_turns import samples_of
from limbeck.traces.sources import read_traces
from limbeck.traces.trace import Trace


def check_templates(config: DistillConfig, tokenizer: Any) -> None:
    """Render the first trace for the student and for every teacher with a tokenizer, and compare the tokens.

    Raises: PairError, naming the first place where they differ.
    """
    teachers = teachers_of(config)
    names = [one.model for one in teachers if one.model is not None and not one.is_translated]
    if not names:
        return
    (trace, *_), _ = read_traces(replace(config.traces, num_traces=1, on_bad="keep"))
    for name in names:
        compare_rendered(trace, name, load_tokenizer(name), tokenizer, config.render)


def compare_rendered(trace: Trace, name: str, teacher: Any, student: Any, config: RenderConfig) -> None:
    """Refuse a teacher whose template makes other tokens of a trace; a base model without one has none to differ.

    Raises: PairError.
    """
    if config.chat_template is None and not teacher.chat_template:
        return
    try:
        theirs = np.concatenate([sample.input_ids for sample in samples_of(trace, teacher, config)])
    except TemplateError as error:
        raise PairError(f"teacher {name}: cannot render the first trace ({error})") from error
    ours = np.concatenate([sample.input_ids for sample in samples_of(trace, student, config)])
    if np.array_equal(ours, theirs):
        return
    length = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:length] != theirs[:length])
    place = int(differing[0]) if len(differing) else length
    raise PairError(
        f"teacher {name}: its chat template makes other tokens of the first trace, from token {place} on "
        f"({_shown(teacher, theirs, place)} there, {_shown(student, ours, place)} for the student). Give one template "
        "for both as render.chat_template."
    )


def carry(config: RenderConfig, model: Any, tokenizer: Any) -> None:
    """What a student is trained with goes where it goes: its chat template, and the tokens that end its turns.

    Raises: TemplateError when the template cannot be read or ends no turn.
    """
    taught = set(stop_ids(tokenizer, config))
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
    generation = causal_lm_of(model).generation_config
    known = generation.eos_token_id
    known = set(known if isinstance(known, list) else [] if known is None else [known])
    if taught <= known:
        return
    generation.eos_token_id = sorted(known | taught)
    added = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(taught - known))))
    console.print(
        f"note: generation_config.json will stop at {added} too, which ends the turns that are trained.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def report(config: DistillConfig, student: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Facts about the pair for the manifest; what is likely to surprise is also said on the console, once."""
    markers = {
        name: len(tokenizer.encode(getattr(config.render, name), add_special_tokens=False))
        for name in ("start_marker", "end_marker")
    }
    ends = set(stop_ids(tokenizer, config.render))
    trained = [bool(e.ce_weight[-1] or e.kd_weight[-1]) and int(e.sample.input_ids[-1]) in ends for e in examples]
    facts = {
        "start_marker_tokens": markers["start_marker"],
        "end_marker_tokens": markers["end_marker"],
        "vocabulary_tokens": vocabulary_size(tokenizer),
        "pad_is_end_of_turn": tokenizer.pad_token_id in ends,
        "end_of_turn_trained_fraction": float(np.mean(trained)) if trained else 0.0,
        "dropout": _dropouts(student),
    }
    for note in notes(facts):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return facts


def notes(facts: dict[str, Any]) -> list[str]:
    """What a user should know about some facts of `report`."""
    found = []
    if facts["end_of_turn_trained_fraction"] == 0:
        found.append(
            "no trace trains the end of turn, so the student may never stop: set truncation.keep_ending, or supervise "
            "the answer."
        )
    if facts["dropout"]:
        told = ", ".join(f"{name} {value:g}" for name, value in facts["dropout"].items())
        found.append(f"the student's config drops or jitters activations in training ({told}); the loss is noisier.")
    if max(facts["start_marker_tokens"], facts["end_marker_tokens"]) > 1:
        found.append(
            f"the think markers are {facts['start_marker_tokens']} and {facts['end_marker_tokens']} tokens, not one "
            "each; segments are found in the text, so they are weighed right, but they cost tokens."
        )
    return found


def _dropouts(student: Any) -> dict[str, float]:
    """What a config says of dropout and jitter in its layers, where it is not 0; classifiers' heads are not trained."""
    fields = text_config(causal_lm_of(student).config).to_dict().items()
    other = ("classifier", "summary")
    named = {name: value for name, value in fields if re.search("drop|jitter", name) and not name.startswith(other)}
    return {name: value for name, value in named.items() if isinstance(value, float) and value > 0}


def _shown(tokenizer: Any, ids: np.ndarray, place: int) -> str:
    return repr(tokenizer.decode(ids[place : place + 4])) if place < len(ids) else "the end"
