"""Load an export in the serving engine, let it write, and compare what it says with what transformers says.

The engine reads the weights by itself, so names, layouts and scales that it takes otherwise than transformers show here
and not at the first user. It writes greedily; the log-probabilities of what it wrote are then computed again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress.export.probes import BUILT_IN_TEXT
from limbeck.config import checked
from limbeck.engine.backends import load_decoder
from limbeck.engine.generation import Generator
from limbeck.engine.jobs import Drawn, Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.errors import ConfigError, LimbeckError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, load_tokenizer, model_hash
from limbeck.models.placement import here
from limbeck.stage import How, Stage
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.sources import TraceConfig, read_problems

TEXTS = "texts.json"
"""What the engine wrote, in the order of the prompts."""
_CACHE_BYTES, _BLOCK_TOKENS = 1 << 26, 16


@checked
class SmokeConfig:
    """What the engine is asked, and how far it may be from transformers."""

    model: str = "OUT/export"
    """The export."""
    problems: TraceConfig | None = None
    """Whose prompts are answered; null takes a few built-in sentences."""
    prompts: int = 4
    """At most this many."""
    max_new_tokens: int = 64
    """Longest answer."""
    max_mean_difference_nats: float = 0.05
    """Largest mean difference of log-probabilities of the written tokens; above it the stage fails."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How prompts become tokens."""

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.max_new_tokens < 1:
            raise ConfigError("smoke: prompts and max_new_tokens must be at least 1")


class Written(NamedTuple):
    """One answer of the engine."""

    prompt: list[int]
    tokens: list[Drawn]
    stopped: bool


def run(config: SmokeConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `texts.json` and a manifest; returns the metrics.

    Raises: LimbeckError when the engine says something else than transformers, ModelError when it cannot load.
    """
    ledger, tokenizer = Ledger(here().device), load_tokenizer(config.model)
    with ledger.phase("engine"):
        start = time.perf_counter()
        generator = Generator(load_decoder(config.model), PrefixCache(_CACHE_BYTES, _BLOCK_TOKENS, config.model))
        loaded = time.perf_counter()
        answers = write(generator, prompts_of(config, tokenizer), config, frozenset(stop_ids(tokenizer, config.render)))
        ended = time.perf_counter()
    with ledger.phase("comparison"):
        model = load_model(config.model)
        differences = torch.cat([difference(model, answer) for answer in answers])
    new_tokens = sum(len(answer.tokens) for answer in answers)
    metrics = {
        "prompts": len(answers),
        "new_tokens": new_tokens,
        "stopped": sum(answer.stopped for answer in answers),
        "load_seconds": loaded - start,
        "tokens_per_second": new_tokens / (ended - loaded),
        "mean_difference_nats": differences.mean().item(),
        "max_difference_nats": differences.max().item(),
    }
    if not metrics["mean_difference_nats"] <= config.max_mean_difference_nats:
        raise LimbeckError(
            f"smoke: {config.model}: log-probabilities of the serving engine are {metrics['mean_difference_nats']:.3g} "
            f"nats from those of transformers, {config.max_mean_difference_nats} are allowed; look at the export's "
            "certificate.md, or raise smoke.max_mean_difference_nats."
        )
    texts = [tokenizer.decode([drawn.token for drawn in answer.tokens]) for answer in answers]
    with output_directory(out, overwrite=True) as working:
        write_json(working / TEXTS, texts)
        inputs = {"model": model_hash(config.model)}
        ledger_tree = ledger.as_dict()
        write_manifest(working, stage="smoke", config=config, inputs=inputs, ledger=ledger_tree, metrics=metrics)
    return Checkpoint(out)


def prompts_of(config: SmokeConfig, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts."""
    if config.problems is None:
        found = [tokenizer.encode(text) for text in BUILT_IN_TEXT]
    else:
        traces, _ = read_problems(config.problems)
        found = [list(render_prompt(tokenizer, trace.messages, config.render)) for trace in traces[: config.prompts]]
    return [ids for ids in found if ids][: config.prompts]


def write(
    generator: Generator, prompts: Sequence[list[int]], config: SmokeConfig, end_tokens: frozenset[int]
) -> list[Written]:
    """Answer all prompts greedily, together."""
    jobs = {
        generator.add(
            Job(
                prompt=prompt,
                max_tokens=config.max_new_tokens,
                sampling=Sampling(temperature=0),
                end_tokens=end_tokens,
                top_log_probs=0,
            )
        ): prompt
        for prompt in prompts
    }
    tokens: dict[int, list[Drawn]] = {number: [] for number in jobs}
    stopped: set[int] = set()
    while generator.running:
        for progress in generator.step():
            tokens[progress.job] += progress.tokens
            if progress.finish == "stop":
                stopped.add(progress.job)
    return [Written(prompt, tokens[number], number in stopped) for number, prompt in jobs.items()]


@torch.inference_mode()
def difference(model: Any, answer: Written) -> torch.Tensor:
    """|log p_engine - log p_transformers| [n] of every token that was written."""
    written = [drawn.token for drawn in answer.tokens]
    ids = torch.tensor([answer.prompt + written], device=model.device)
    logits = model(ids).logits[0, len(answer.prompt) - 1 : -1].cpu()
    theirs = logits.float().log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
    ours = torch.tensor([float("nan") if drawn.log_prob is None else drawn.log_prob for drawn in answer.tokens])
    return (theirs - ours).abs()


STAGE = Stage(name="smoke", config=SmokeConfig, run=run)
