"""Many texts written together on an accelerator: a step is the same few kernels whatever the texts, and nobody waits.

1. Texts have slots: rows of keys and values for the longest text, allocated once.
2. A new text's prompt is read by the decoder as always and its keys are copied into a slot; the random numbers of all
   its tokens go with it, those of `Run`, so that a text is the one that a CPU writes, up to ties that rounding decides.
3. A step takes all slots one token on: products, attention over the slots, drawing, and the marks of which texts are
   over. It reads and writes the same tensors every time, so that on CUDA it is captured once and replayed.
4. The host looks every LOOK_EVERY steps: ended texts are taken out, new ones put in. Slots of ended texts run along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.engine.decoder import Decoder
from limbeck.engine.drawing import invert_cumulative
from limbeck.engine.jobs import Job
from limbeck.engine.states import Segment
from limbeck.engine.weights import LayerWeights
from limbeck.progress import say

LOOK_EVERY = 16
"""Steps between two looks at what is over."""
PASS_TOKENS = 8192
"""Most prompt tokens in one forward pass."""
ROW_STEP = 8
LENGTH_STEP = 64
"""Slots and their length are multiples of these, so that few sizes occur."""


class Text(NamedTuple):
    """What came of a job."""

    number: int
    tokens: list[int]
    stopped: bool
    log_probs: list[float]
    """At the job's temperature; empty where they were not asked for."""


class Slots:
    """Room for texts under way, all with one way of drawing."""

    def __init__(self, decoder: Decoder, jobs: Sequence[Job], rows: int) -> None:
        """For at most `rows` of the jobs at once."""
        self._decoder, first = decoder, jobs[0]
        self._sampling, self._has_log_probs = first.sampling, first.top_log_probs is not None
        self._cold = first.log_prob_temperature
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        self.rows, self.length = _rounded(rows, ROW_STEP), _rounded(longest, LENGTH_STEP)
        most, device = max(job.max_tokens for job in jobs), decoder.device
        shape = (decoder.layers, self.rows, decoder.key_heads, self.length, decoder.head_size)
        self._keys, self._values = (torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in range(2))
        self._tokens, self._places, self._counts, self._limits = (
            torch.zeros(self.rows, dtype=torch.int64, device=device) for _ in range(4)
        )
        self._is_over = torch.ones(self.rows, dtype=torch.bool, device=device)
        self._uniforms = torch.zeros(self.rows, most, dtype=torch.float64, device=device)
        self._written = torch.zeros(self.rows, most, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(self.rows, most, device=device)
        self._ends = torch.tensor(sorted(first.end_tokens) or [-1], device=device)
        self._all = torch.arange(self.rows, device=device)
        self._columns = torch.arange(self.length, device=device)
        self._numbers: list[int | None] = [None] * self.rows
        self._graph: Callable[[], None] | None = None

    @property
    def free(self) -> list[int]:
        """Slots without a text."""
        return [row for row, number in enumerate(self._numbers) if number is None]

    @property
    def is_idle(self) -> bool:
        """Whether no text is under way."""
        return all(number is None for number in self._numbers)

    def fill(self, jobs: Sequence[tuple[int, Job]]) -> None:
        """Read the prompts of as many jobs as there are free slots, at most; each with its number."""
        decoder, rows = self._decoder, self.free[: len(jobs)]
        states = [decoder.states(len(job.prompt)) for _, job in jobs]
        heads = [
            Segment(job.prompt[:-1], state, 0, grows=True)
            for (_, job), state in zip(jobs, states, strict=True)
            if len(job.prompt) > 1
        ]
        for group in _passes(heads):
            decoder.run(group)
        for row, (number, job), state in zip(rows, jobs, states, strict=True):
            known = len(job.prompt) - 1
            self._keys[:, row, :, :known] = state.keys[:, :, :known]
            self._values[:, row, :, :known] = state.values[:, :, :known]
            self._numbers[row] = number
        chosen = [job for _, job in jobs]
        drawn = np.zeros((len(jobs), self._uniforms.shape[1]))
        for line, job in zip(drawn, chosen, strict=True):
            if not job.sampling.is_greedy:
                line[: job.max_tokens] = np.random.Generator(np.random.PCG64(job.sampling.seed)).random(job.max_tokens)
        device = decoder.device
        where = torch.tensor(rows, device=device)
        numbers = [(job.prompt[-1], len(job.prompt) - 1, job.max_tokens) for job in chosen]
        tokens, places, limits = torch.tensor(numbers, device=device).unbind(1)
        self._tokens[where], self._places[where], self._limits[where] = tokens, places, limits
        self._uniforms[where] = torch.from_numpy(drawn).to(device)
        self._counts[where] = 0
        self._is_over[where] = False

    @torch.inference_mode()
    def run(self) -> None:
        """LOOK_EVERY tokens for every text."""
        step = self._captured()
        for _ in range(LOOK_EVERY):
            step()

    def ended(self) -> Iterator[Text]:
        """Take out what is over; the device is waited for, once where nothing is."""
        over = self._is_over.cpu().tolist()
        rows = [row for row, number in enumerate(self._numbers) if number is not None and over[row]]
        if not rows:
            return
        where = torch.tensor(rows, device=self._decoder.device)
        parts = (self._counts, self._written, self._log_probs)
        counts, written, log_probs = (part[where].cpu().tolist() for part in parts)
        ends = set(self._ends.cpu().tolist())
        for line, row in enumerate(rows):
            number, self._numbers[row] = self._numbers[row], None
            assert number is not None
            tokens, count = written[line][: counts[line]], counts[line]
            found = log_probs[line][:count] if self._has_log_probs else []
            yield Text(number, tokens, bool(tokens) and tokens[-1] in ends, found)

    def _captured(self) -> Callable[[], None]:
        """The step, as a CUDA graph where there can be one."""
        if self._graph is None:
            self._graph = self._step
            if torch.version.cuda is not None and self._decoder.device.type == "cuda":
                try:
                    self._graph = _graph_of(self._step)
                except RuntimeError as error:
                    say(f"note: decoding is not captured ({' '.join(str(error).split())[:200]}).")
        return self._graph

    def _step(self) -> None:
        """One token for every slot."""
        logits = self._logits()
        tokens = self._drawn(logits)
        # What is over stays as it is: its place does not move, and what is written there is not read.
        goes_on = ~self._is_over
        if self._has_log_probs:
            cold = (logits / self._cold).log_softmax(-1).gather(1, tokens[:, None])
            self._write(self._log_probs, cold, goes_on)
        self._write(self._written, tokens[:, None], goes_on)
        self._counts += goes_on
        self._places += goes_on
        self._tokens.copy_(torch.where(goes_on, tokens, self._tokens))
        has_ended = (tokens[:, None] == self._ends).any(1) | (self._counts >= self._limits)
        self._is_over |= has_ended

    def _place_of_count(self) -> Tensor:
        return self._counts.clamp(max=self._written.shape[1] - 1)[:, None]

    def _write(self, table: Tensor, values: Tensor, goes_on: Tensor) -> None:
        """The next number [R 1] of every text that goes on."""
        table.scatter_(1, self._place_of_count(), torch.where(goes_on[:, None], values, self._now(table)))

    def _now(self, table: Tensor) -> Tensor:
        return table.gather(1, self._place_of_count())

    def _logits(self) -> Tensor:
        """[R V] behind the last token of every slot, whose keys and values are put in place."""
        decoder, weights, places = self._decoder, self._decoder.weights, self._places
        x = weights.embed(self._tokens)
        turns = [(cos[places], sin[places]) for cos, sin in weights.ropes]
        masks = {window: self._mask(window) for window in {block.window for block in weights.blocks}}
        for number, block in enumerate(weights.blocks):
            attended = self._attention(x, block, number, turns[block.rope], masks[block.window])
            x = decoder.feed_forward(decoder.added(x, block.output(attended), block.attention_out_norm), block)
        return decoder.logits(decoder.normed(x, weights.norm))

    def _mask(self, window: int | None) -> Tensor:
        """bool [R 1 1 T]: the keys that each slot's token sees."""
        distance = self._places[:, None] - self._columns
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return seen[:, None, None]

    def _attention(
        self, x: Tensor, block: LayerWeights, number: int, turns: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        decoder = self._decoder
        query, key, value = decoder.projected(decoder.normed(x, block.attention_norm), block, turns)
        keys, values = self._keys[number], self._values[number]
        keys[self._all, :, self._places] = key
        values[self._all, :, self._places] = value
        # The heads of a group stand as queries of one head, so that keys are never repeated.
        grouped = query.unflatten(1, (key.shape[1], -1))
        attend = nn.functional.scaled_dot_product_attention
        return attend(grouped, keys, values, attn_mask=mask, scale=block.scale).flatten(1)

    def _drawn(self, logits: Tensor) -> Tensor:
        """The next token [R] of every slot, as `drawing.draw_tokens` draws it."""
        sampling = self._sampling
        if sampling.is_greedy:
            return logits.argmax(-1)
        targets = self._now(self._uniforms)[:, 0]
        probabilities = torch.softmax(logits / sampling.temperature, -1)
        if sampling.top_p >= 1.0:
            return _inverted(probabilities, targets)
        ranked, order = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1, dtype=torch.float64) - ranked
        kept = ranked.masked_fill(before >= sampling.top_p, 0.0)
        return order.gather(1, _inverted(kept, targets)[:, None])[:, 0]


def takes(decoder: object, jobs: Sequence[Job]) -> bool:
    """Whether `Slots` writes such jobs, which are alike but for their prompts: plainly drawn, on an accelerator."""
    if not isinstance(decoder, Decoder) or decoder.device.type == "cpu" or decoder.is_int8 or not jobs:
        return False
    job, sampling = jobs[0], jobs[0].sampling
    is_ruled = job.min_tokens or job.thought or job.constraint or job.is_echoed or job.top_log_probs
    return not (is_ruled or sampling.top_k or sampling.min_p)


def _inverted(probabilities: Tensor, targets: Tensor) -> Tensor:
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return invert_cumulative(cumulative, targets * cumulative[:, -1])


def _passes(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Prompts that are read in one forward pass."""
    group: list[Segment] = []
    for segment in segments:
        if group and sum(len(s.tokens) for s in group) + len(segment.tokens) > PASS_TOKENS:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """A step captured: it runs once to warm up, which changes the slots as any step does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
