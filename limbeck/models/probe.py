"""A model is asked, not looked up: two random sequences, run every way, against each of them alone.

The one who is asked is a miniature (models/miniature.py) of the model's config, in float32. What plain transformers
gives for a sequence alone, with its eager attention, is the truth. From it follow, for every model of that config:

1. what its logits are beside the product of hidden states and head (scale, soft cap), or a refusal;
2. which attention of torch it computes the same with;
3. the fastest layout that agrees (models/layouts.py), and whether the lean forward does (models/lean.py).

Answers are kept in memory and on disk under a hash of config, device, versions and the code that was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from limbeck.errors import ModelError
from limbeck.models import lean_device
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.layouts import WAYS, Way, run, run_groups
from limbeck.models.lean import can_run, packed_rows, plan_packed
from limbeck.models.miniature import VOCABULARY, miniatures
from limbeck.models.parts import Head, LogitForm, causal_lm_of, decoder_of, logit_forms, output_layer_of, text_config

LENGTHS = (150, 21)
"""Tokens of the two sequences: beyond and below every threshold of a miniature, and two chunks of 64."""
TOLERANCE = 1e-4
"""Largest difference of a logit that rounding makes, over their largest size."""

Forward = Callable[[Any, list[Tensor]], list[Tensor]]
"""Logits [T V] of each of the sequences [T], by some way of running the model."""


class ProbeResult(NamedTuple):
    """What was found for a config."""

    way: Way
    """The fastest layout that agrees."""
    pads: bool
    """Whether the padded layout agrees."""
    attention: str
    """The attention of torch that agrees: sdpa or eager; of a family without a choice, the one that it has."""
    is_lean: bool
    """Whether the lean forward agrees."""
    form: LogitForm
    """What the logits are beside the product."""
    reason: str
    """Why no faster layout; empty for packed."""


class Answer(NamedTuple):
    """Whether one way of running a model agrees with transformers."""

    agrees: bool
    reason: str
    """Why it does not; empty where it does."""


def ask(model: Any) -> ProbeResult:
    """What holds for a model, on the device where it is.

    Raises: ModelError when it is no causal language model, or does something to its logits that is not known.
    """
    lm = causal_lm_of(model)
    device = _device_of(lm)
    known = _verdicts.setdefault(lm, {})
    if device not in known:
        known[device] = ask_config(type(lm), lm.config, device)
    return known[device]


def ask_config(kind: type[Any], config: Any, device: str = "cpu") -> ProbeResult:
    """The same before any weight is read.

    Args:
      kind: class of the model; config: its config.
      device: type of the device that it will run on.
    """
    found = _kept(_key(kind, config, device, "layouts"), lambda: _examine(kind, config, device))
    if "refused" in found:
        raise ModelError(f"{kind.__name__}: {found['refused']}")
    return ProbeResult(**found | {"form": LogitForm(*found["form"])})


def agrees(model: Any, name: str, forward: Forward) -> Answer:
    """Whether `forward` gives a model's logits: asked of its miniature, once for a config and a name.

    Args:
      model: a causal LM, of any size.
      name: of the way of running it, under which the answer is kept.
      forward: what is tried; an exception of it is a no, with its message.
    """
    lm = causal_lm_of(model)
    device = _device_of(lm)

    def examine() -> dict[str, Any]:
        small, sequences, truth = _truth(type(lm), lm.config, device)
        small.set_attn_implementation(ask(lm).attention)
        reason = _disagreement(lambda: forward(small, sequences), truth)
        return {"agrees": not reason, "reason": reason}

    return Answer(**_kept(_key(type(lm), lm.config, device, name), examine))


def head_of(model: Any) -> Head:
    """The output projection, with its soft cap.

    Raises: ModelError when the model does more to its logits than scale, multiply, add and cap.
    """
    layer, softcap = output_layer_of(model), ask(model).form.softcap(_logit_config(model))
    return Head(layer.weight, getattr(layer, "bias", None), softcap)


def logit_scale(model: Any) -> float:
    """What the last hidden states of a model are multiplied with before the head."""
    return ask(model).form.scale(_logit_config(model))


def _logit_config(model: Any) -> Any:
    return text_config(causal_lm_of(model).config)


_verdicts: weakref.WeakKeyDictionary[Any, dict[str, ProbeResult]] = weakref.WeakKeyDictionary()


def _examine(kind: type[Any], config: Any, device: str) -> dict[str, Any]:
    try:
        model, sequences, truth = _truth(kind, config, device)
        form = _logit_form(model, sequences, truth)
    except ModelError as error:
        return {"refused": str(error)}
    own = model.config._attn_implementation
    attention = "sdpa" if not _tried(model, sequences, truth, form, "alone", "sdpa") else own
    attentions = dict.fromkeys(WAYS, attention) | {"packed": PACKED_ATTENTION}
    reasons = {way: _tried(model, sequences, truth, form, way, attentions[way]) for way in WAYS}
    way = next((way for way in WAYS if not reasons[way]), None)
    if way is None:
        return {"refused": f"its hidden states are not those of its own forward pass ({reasons['alone']})."}
    model.set_attn_implementation(attentions[way])
    has_pass = can_run(decoder_of(model)) or lean_device.can_run(decoder_of(model))
    lean = has_pass and not _disagreement(lambda: _lean_logits(model, sequences, form), truth)
    return {
        "way": way,
        "pads": not reasons["padded"],
        "attention": attention,
        "is_lean": lean,
        "form": list(form),
        "reason": "" if way == "packed" else next(filter(None, reasons.values()), ""),
    }


def _truth(kind: type[Any], config: Any, device: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A miniature, the sequences, and their logits by plain transformers.

    Raises: ModelError when no miniature runs, or its logits depend on what ran before or comes later.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(VOCABULARY // 2, VOCABULARY, (n,), generator=generator).to(device) for n in LENGTHS]
    cause = ""
    for make in miniatures(kind, config):
        try:
            model = make().to(device)
            model.set_attn_implementation("eager")
            truth = plain_logits(model, sequences)
            again = plain_logits(model, sequences[::-1])[::-1]
            changed = [torch.cat([s[:-1], s[-1:] - 1]) for s in sequences]
            ahead = plain_logits(model, changed)
        except Exception as error:  # whatever a family raises is the reason that is told
            cause = cause or _one_line(error)
            continue
        if _gap(truth, again) > TOLERANCE:
            raise ModelError("its logits depend on the sequences that ran before, so no loss of it is certain.")
        if _gap([t[:-1] for t in truth], [a[:-1] for a in ahead]) > TOLERANCE:
            raise ModelError("its tokens see what comes after them; only causal language models are supported.")
        return model, sequences, truth
    raise ModelError(f"it could not be tried in small ({cause}), so nothing is known of it.")


def plain_logits(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Logits [T V] of each sequence alone, as transformers computes them."""
    return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]


def _logit_form(model: Any, sequences: list[Tensor], truth: list[Tensor]) -> LogitForm:
    reason = ""
    for form in logit_forms(model.config):
        reason = _tried(model, sequences, truth, form, "alone", model.config._attn_implementation)
        if not reason:
            return form
    raise ModelError(f"changes its logits in a way that is not known here ({reason}).")


def _tried(model: Any, sequences: list[Tensor], truth: list[Tensor], form: LogitForm, way: Way, attention: str) -> str:
    """Why a layout does not agree; empty where it does."""

    def logits() -> list[Tensor]:
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:  # some families warn and stay as they are
            raise ModelError(f"it has no {attention} attention")
        decoder, ids = decoder_of(model), torch.cat(sequences)[None]
        # In one group, that a short sequence is padded far.
        hidden = run_groups(decoder, ids, LENGTHS, [[0, 1]]) if way == "padded" else run(decoder, ids, LENGTHS, way)
        return _logits(model, hidden[0], form)

    return _disagreement(logits, truth, way)


def _lean_logits(model: Any, sequences: list[Tensor], form: LogitForm) -> list[Tensor]:
    ids = torch.cat(sequences)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in LENGTHS])
    rows = torch.arange(len(ids), device=ids.device)
    if ids.device.type != "cpu":
        there = lean_device.plan_of(ids, LENGTHS, rows)
        return _logits(model, lean_device.packed_rows(decoder_of(model), ids, positions, there), form)
    plan = plan_packed(ids, LENGTHS, rows)
    return _logits(model, packed_rows(decoder_of(model), ids, positions, plan), form)


def _logits(model: Any, hidden: Tensor, form: LogitForm) -> list[Tensor]:
    layer, config = output_layer_of(model), _logit_config(model)
    head = Head(layer.weight, getattr(layer, "bias", None), form.softcap(config))
    return list(head.logits(hidden * form.scale(config)).split(list(LENGTHS)))


def _disagreement(logits: Callable[[], list[Tensor]], truth: list[Tensor], what: str = "") -> str:
    try:
        gap = _gap(truth, logits())
    except Exception as error:  # whatever a family raises is the reason that is told
        return _one_line(error)
    return "" if gap <= TOLERANCE else f"{what} logits are off by {gap:.1g}".strip()


def _gap(truth: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference of a logit, over the largest logit; infinity for NaN."""
    worst = 0.0
    for want, got in zip(truth, found, strict=True):
        gap = float((got.float() - want).abs().max() / want.abs().max().clamp(min=1e-30))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _kept(key: str, examine: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """An answer from memory or disk, or found now and kept; a disk that cannot be written costs the time alone."""
    if key in _answers:
        return _answers[key]
    file = _directory() / f"{key}.json"
    try:
        _answers[key] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Whoever asks may be in a mode of its own (bf16, no gradients); the answer is of float32.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), torch.inference_mode():
            _answers[key] = examine()
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(_answers[key]), encoding="utf-8")
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
    return _answers[key]


_answers: dict[str, dict[str, Any]] = {}


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / "probes"


def _key(kind: type[Any], config: Any, device: str, question: str) -> str:
    ignored = {"_name_or_path", "transformers_version", "architectures", "_attn_implementation_internal"}
    fields = {name: value for name, value in config.to_dict().items() if name not in ignored}
    facts = [kind.__name__, fields, device, question, transformers.__version__, torch.__version__, _code_hash()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def _code_hash() -> str:
    """Of what is asked and who asks: another version of them finds for itself."""
    names = ("attention", "layouts", "lean", "lean_device", "miniature", "ops", "parts", "pointwise", "probe", "varlen")
    return hashlib.sha256(b"".join((Path(__file__).parent / f"{n}.py").read_bytes() for n in names)).hexdigest()


def _device_of(lm: Any) -> str:
    kind = next((parameter.device.type for parameter in lm.parameters()), "cpu")
    return "cpu" if kind == "meta" else kind


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
