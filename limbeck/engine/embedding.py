"""Vectors of texts: the states behind the final norm, pooled as the checkpoint says (sentence-transformers' files).

    mean   v = 1/T sum_t h_t          last   v = h_T          normalised   v / |v|

Source: Reimers and Gurevych, 1908.10084; the last token's state for causal models, as in 2506.05176.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.decoder import Decoder
from limbeck.engine.states import Segment
from limbeck.errors import ModelError
from limbeck.models.load import locate

MODES: dict[str, Literal["mean", "last"]] = {"mean_tokens": "mean", "mean": "mean", "lasttoken": "last"}

FLAG = "pooling_mode_"


class Pooling(NamedTuple):
    """How the states of a text become its vector."""

    mode: Literal["mean", "last"]
    is_normalised: bool
    prompt: str = ""
    """In front of every text."""


def pooling_of(model: str, decoder: Backend) -> Pooling:
    """A model's pooling, by `modules.json` and the files that it names.

    Raises: ModelError for a model that has none, or one that is not known here, with the reason.
    """
    place = locate(model)
    root = Path(place.path)
    if not place.is_local or not (root / "modules.json").is_file():
        raise ModelError(f"{model} is a causal language model and has no embeddings of texts (no modules.json).")
    if not isinstance(decoder, Decoder):
        raise ModelError(f"{model}: transformers runs this model here, without its states.")
    kinds = _kinds(root)
    tree, prompt = _read(kinds["Pooling"] / "config.json"), _prompt(root)
    modes = _modes(tree)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ModelError(f"{model}: pooling {', '.join(modes) or 'none'}; known are {', '.join(MODES)}.")
    if prompt and not tree.get("include_prompt", True):
        raise ModelError(f"{model}: a default prompt that is left out of the pooling (include_prompt) is not known.")
    return Pooling(MODES[modes[0]], "Normalize" in kinds, prompt)


class Embedding:
    """Texts under way: `step` reads some more of their tokens, one text after the other."""

    def __init__(self, decoder: Backend, texts: Sequence[Sequence[int]], pooling: Pooling, tokens: int) -> None:
        """`texts`: token ids, at least one each; `tokens`: of a step."""
        self._decoder, self._texts, self._pooling, self._tokens = decoder, texts, pooling, tokens
        self._text = self._read = 0
        """The next text, and how much of it is read."""
        self._states: Any = None
        self._found: list[Tensor] = []
        """[D] of each text begun: the sum of its states, or the last one."""

    @torch.inference_mode()
    def step(self) -> Tensor | None:
        """The vectors [N D] once all texts are read."""
        segments, owners, left = [], [], self._tokens
        while left > 0 and self._text < len(self._texts):
            text = self._texts[self._text]
            if not self._read:
                self._states = self._decoder.states(len(text))
            stop = min(len(text), self._read + left)
            segments.append(Segment(text[self._read : stop], self._states, self._read, grows=True))
            owners.append(self._text)
            left -= stop - self._read
            self._text, self._read = (self._text + 1, 0) if stop == len(text) else (self._text, stop)
        rows = self._decoder.run(segments, every_row=True).split([len(segment.tokens) for segment in segments])
        for owner, part in zip(owners, rows, strict=True):
            self._take(owner, part)
        return self._vectors() if self._text == len(self._texts) else None

    def _take(self, owner: int, states: Tensor) -> None:
        new = states.sum(0) if self._pooling.mode == "mean" else states[-1]
        if owner == len(self._found):
            self._found.append(new)
        else:
            self._found[owner] = self._found[owner] + new if self._pooling.mode == "mean" else new

    def _vectors(self) -> Tensor:
        vectors = torch.stack(self._found).float()
        if self._pooling.mode == "mean":
            vectors = vectors / torch.tensor([[len(text)] for text in self._texts], device=vectors.device)
        return torch.nn.functional.normalize(vectors, dim=1) if self._pooling.is_normalised else vectors


def _kinds(root: Path) -> dict[str, Path]:
    """The modules' directories, by what they do. Raises: ModelError for others than a transformer and its pooling."""
    kinds = {str(module["type"]).rpartition(".")[2]: root / module["path"] for module in _read(root / "modules.json")}
    if "Pooling" not in kinds or kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{root}/modules.json: {', '.join(kinds)}; known are Transformer, Pooling and Normalize.")
    return kinds


def _modes(tree: dict[str, Any]) -> list[str]:
    """Those of a pooling's config.json, in its older form or its newer one."""
    if "pooling_mode" in tree:
        return [str(tree["pooling_mode"])]
    flags = [name for name, value in tree.items() if name.startswith(FLAG) and value is True]
    return [name.removeprefix(FLAG) for name in flags]


def _prompt(root: Path) -> str:
    file = root / "config_sentence_transformers.json"
    tree = _read(file) if file.is_file() else {}
    name = tree.get("default_prompt_name")
    return "" if name is None else str(tree["prompts"][name])


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not read ({error}).") from None
