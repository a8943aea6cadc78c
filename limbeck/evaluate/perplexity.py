"""Perplexity on a text, with an interval, and the divergence from a reference model on the same tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.config import checked
from limbeck.cost.memory import HEAD_ROWS
from limbeck.errors import ConfigError
from limbeck.evaluate.metrics import ratio_interval
from limbeck.models.anatomy import head_of, hidden_states
from limbeck.traces.counts import tell
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sources import TraceConfig, read_traces

PROSE = "prose"
_BATCH_TOKENS = 2048


@checked
class PerplexityConfig:
    """Which text, cut how, against which reference."""

    text: str = PROSE
    """prose (the story in the public domain that reasoning-gym carries), or a UTF-8 text file."""
    traces: TraceConfig | None = None
    """Traces instead of a text, rendered whole; windows do not run from one into the next."""
    window_tokens: int = 512
    """Length of the windows, which do not overlap; the first token of each is given, all others are predicted."""
    max_tokens: int | None = None
    """Only the first so many tokens; null: all."""
    reference: str | None = None
    """Model of the same tokenizer: the mean divergence KL(reference || model) is measured too."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        if self.window_tokens < 2 or (self.max_tokens is not None and self.max_tokens < 2):
            raise ConfigError("perplexity: window_tokens and max_tokens must be 2 or more")


class WindowSums(NamedTuple):
    """Sums over the predicted tokens of each window, float64 [W]."""

    nll: np.ndarray
    """Negative log-likelihood in nats."""
    kl: np.ndarray | None
    """KL(reference || model) in nats; None without a reference."""
    tokens: np.ndarray
    """How many tokens were predicted."""

    def summary(self, seed: int = 0) -> dict[str, float | int]:
        """Perplexity, nats a token and KL a token, each with the ends of its 95 % interval over windows."""
        nll = ratio_interval(self.nll, self.tokens, seed)
        found: dict[str, float | int] = {"windows": len(self.tokens), "tokens": int(self.tokens.sum())}
        with np.errstate(over="ignore"):
            for end, value in (("", nll.value), ("_low", nll.low), ("_high", nll.high)):
                found |= {f"nats_per_token{end}": value, f"perplexity{end}": float(np.exp(value))}
        if self.kl is not None:
            kl = ratio_interval(self.kl, self.tokens, seed)
            found |= {"kl_to_reference": kl.value, "kl_to_reference_low": kl.low, "kl_to_reference_high": kl.high}
        return found


def token_windows(config: PerplexityConfig, tokenizer: Any, rendering: RenderConfig) -> list[list[int]]:
    """The token ids of every window; a last one that is shorter counts from 2 tokens on.

    Raises: ConfigError when the text is missing, unreadable or shorter than 2 tokens.
    """
    windows, left = [], config.max_tokens
    for ids in _sequences(config, tokenizer, rendering):
        ids = ids if left is None else ids[:left]
        left = None if left is None else left - len(ids)
        pieces = (ids[start : start + config.window_tokens] for start in range(0, len(ids), config.window_tokens))
        windows += [piece for piece in pieces if len(piece) >= 2]
    if not windows:
        raise ConfigError(f"perplexity: {config.text if config.traces is None else 'the traces'}: fewer than 2 tokens.")
    return windows


def _sequences(config: PerplexityConfig, tokenizer: Any, rendering: RenderConfig) -> list[list[int]]:
    if config.traces is None:
        return [tokenizer(read_text(config.text), add_special_tokens=False, verbose=False)["input_ids"]]
    traces, read = read_traces(config.traces)
    tell(read.lines())
    return [render(trace, tokenizer, rendering).input_ids.tolist() for trace in traces]


def read_text(source: str) -> str:
    """A text file, or the built-in prose without the licence around it."""
    if source == PROSE:
        return _prose()
    try:
        return Path(source).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"perplexity.text: {source} does not exist; name a UTF-8 file, or `{PROSE}`.") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"perplexity.text: {source} is no UTF-8 text file.") from error


def _prose() -> str:
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("perplexity.text: prose comes with the package reasoning-gym, which is not installed.")
    path = Path(spec.submodule_search_locations[0]) / "data" / "in_the_year_2889.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    marks = [number for number, line in enumerate(lines) if line.startswith(("*** START OF", "*** END OF"))]
    return "\n".join(lines[marks[0] + 1 : marks[1]]).strip()


@torch.inference_mode()
def window_sums(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    reference: nn.Module | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> WindowSums:
    """Sums of -log p(token | those before it in its window), and of sum_v q_v log(q_v / p_v) with q the reference's.

    Args:
      model: a causal LM with a plain head.
      windows: token ids, 2 or more in each.
      reference: over the same vocabulary.
      advance: called with the number of windows that have just been scored.
    Returns: sums for the windows in their order. Logits exist for a few rows at a time.
    Raises: ModelError for a model whose logits are more than a product; ConfigError for another vocabulary.
    """
    nll, kl = np.zeros(len(windows)), np.zeros(len(windows))
    for chosen in _batches(windows):
        batch = [windows[index] for index in chosen]
        predicted = torch.tensor([len(ids) - 1 for ids in batch])
        targets = torch.cat([torch.tensor(ids[1:]) for ids in batch])
        owner = torch.repeat_interleave(torch.tensor(chosen), predicted).numpy()
        logits = _row_logits(model, batch)
        reference_logits = _row_logits(reference, batch) if reference is not None else None
        for part, rows in enumerate(logits):
            place = slice(part * HEAD_ROWS, part * HEAD_ROWS + len(rows))
            log_probs = rows.log_softmax(-1)
            losses = -log_probs.gather(-1, targets[place, None].to(rows.device)).squeeze(-1)
            np.add.at(nll, owner[place], losses.double().cpu().numpy())
            if reference_logits is not None:
                expected = next(reference_logits).to(rows.device).log_softmax(-1)
                np.add.at(kl, owner[place], _divergence(expected, log_probs).cpu().numpy())
        advance(len(batch))
    tokens = np.array([len(ids) - 1 for ids in windows], dtype=np.float64)
    return WindowSums(nll, kl if reference is not None else None, tokens)


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of windows of about equal length, few enough to fit a batch of tokens."""
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
    start = 0
    while start < len(order):
        count = max(1, _BATCH_TOKENS // len(windows[order[start]]))
        yield order[start : start + count]
        start += count


def _row_logits(model: nn.Module, batch: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """float32 [n V] logits before every predicted token of a batch, some rows at a time."""
    head = head_of(model)
    lengths, device = [len(ids) for ids in batch], head.weight.device
    input_ids = torch.tensor([id for ids in batch for id in ids], device=device)[None]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    hidden = hidden_states(model, input_ids, positions, lengths)[0]
    rows = torch.cat([states[:-1] for states in hidden.split(lengths)])
    for part in rows.split(HEAD_ROWS):
        yield head.logits(part).float()


def _divergence(expected: Tensor, log_probs: Tensor) -> Tensor:
    """KL [n] of log-probabilities [n V] from the expected ones, in float64 sums."""
    if expected.shape[1] != log_probs.shape[1]:
        raise ConfigError(
            f"perplexity.reference: its vocabulary has {expected.shape[1]} entries, the model's {log_probs.shape[1]}; "
            "take a model of the same tokenizer and head."
        )
    return (expected.exp() * (expected - log_probs)).sum(-1, dtype=torch.float64)
