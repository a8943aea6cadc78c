"""What a teacher of another tokenizer is worth, beside one of the student's own: gain over the start, over seeds.

The built-in teacher reads a symbol of builtin:chain as a token. Its students have the body of tiny-student and three
tokenizers: `own`, the teacher's; `bytes`, every byte a token, so that the teacher's words lie over several of the
student's; `merged`, byte-level BPE with GPT-2's splits, learnt on the traces, whose tokens (" 7", "\\n\\n", half words)
lie over several of the teacher's as well. Rows of new tokens are means of the symbols that they spell, or noise. Each
student is first trained on the text of some whole traces, at a rate and length that leave room, which is its start;
then, on other traces, by KD alone (forward KL to a cache written for its tokenizer), or by CE alone.

Score: share of held-out problems answered right, greedy; seeds differ in the order of the traces. `gain_kept`: gain of
KD over the start, over that of the run with the same seed whose student has the teacher's tokenizer; the smaller of the
two tokenizers. Reach: 0.9.

    python benchmarks/translated_cache.py [--quick] [--seeds 3] [--scratch DIR] [--out DIR]

Runs that are finished in the scratch directory are not run again; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _process import conditions, markdown, publish
from reasoning_recipes import interval
from recovery import finite, shown
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.distill import caching
from limbeck.distill.commands import DISTILL
from limbeck.distill.config import DistillConfig
from limbeck.evaluate.commands import EVALUATE
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import load_model, load_tokenizer, quiet
from limbeck.models.tiny import CHAT_TEMPLATE, PAD, TURN_END, TURN_START
from limbeck.models.token_bytes import TokenBytes
from limbeck.stage import go_on
from limbeck.traces.sources import TraceConfig, read_traces

TEACHER, STUDENT, OWN = "tiny-teacher", "tiny-student", "own"
MERGES = {"bytes": 0, "merged": 60}
STEPS = {"chain_min_steps": 4, "chain_max_steps": 6}
HELD_OUT_SEED = 1_000_001
SHARES = ("vocabulary_matched", "positions_same_start", "positions_over_several", "mass_exact", "mass_open")


class Study:
    """The sizes, and the directory of finished runs."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch = scratch
        self.warmup_steps, self.epochs = (2, 1.0) if quick else (100, 1.0)
        self.num_traces, self.num_problems = (40, 10) if quick else (600, 200)

    def traces(self, seed: int, count: int | None = None) -> dict[str, Any]:
        """Worked problems, other ones for each seed."""
        return {"source": "builtin:chain", "num_traces": count or self.num_traces, "seed": seed, **STEPS}

    def start(self, name: str) -> str:
        """The directory of the student with that tokenizer, trained on the text of some whole traces."""
        raw = self.scratch / f"raw-{name}"
        if not (raw / "tokenizer.json").exists():
            texts = read_traces(TraceConfig(**self.traces(seed=50)))[0]
            tokenizer = load_tokenizer(STUDENT)
            if name != OWN:
                written = [f"{trace.messages[-1]['content']}\n{trace.cot}\n{trace.answer}" for trace in texts]
                tokenizer = byte_level(written, MERGES[name])
            rebuild(tokenizer, raw)
        return self.trained(str(raw), self.scratch / f"start-{name}", 60, 0, None, max_steps=self.warmup_steps)

    def trained(
        self, student: str, out: Path, traces_seed: int, seed: int, cache: Path | None, max_steps: int | None = None
    ) -> str:
        """A student trained by KD alone, or without a cache by CE alone."""
        tree = {
            "student": {"model": student},
            "teacher": {"cache": None if cache is None else str(cache)},
            "traces": self.traces(traces_seed),
            "num_validation": 0,
            "loss": {"kd_ratio": 0.0 if cache is None else 1.0},
            "training": {"epochs": self.epochs, "max_steps": max_steps, "batch_size": 8, "seed": seed},
            "optimizer": {"learning_rate": 1.5e-3, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        }
        return str(go_on(DISTILL, build(DistillConfig, tree), out).path)

    def cache(self, name: str, start: str) -> Path:
        """What the teacher says, for the student's tokenizer."""
        out = self.scratch / f"cache-{name}"
        tree = {
            "teacher": TEACHER,
            "traces": self.traces(61),
            "cache": {"top_k": 32, "tokenizer": "" if name == OWN else start},
        }
        caching.run(build(caching.CacheStageConfig, tree), out)
        return out

    def score(self, model: str) -> float:
        """Share of the held-out problems answered right."""
        tree = {
            "model": model,
            "problems": self.traces(HELD_OUT_SEED, self.num_problems),
            "evaluate": {"max_new_tokens": 600, "batch_size": 300},
        }
        found = go_on(EVALUATE, build(EvaluateStageConfig, tree), self.scratch / "scores" / Path(model).name)
        return float(found.metrics["accuracy"])

    def measure(self, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Scores of a tokenizer's students, and what its cache says of itself."""
        start = self.start(name)
        before = self.score(start)
        cache = self.cache(name, start)
        scores: dict[str, list[float]] = {"KD": [], "CE": []}
        for seed in seeds:
            for arm, source in (("KD", cache), ("CE", None)):
                model = self.trained(start, self.scratch / f"{name}-{arm}-{seed}", 61, seed, source)
                scores[arm].append(self.score(model))
        metrics = Checkpoint(cache).metrics
        shares = {share: metrics.get(share) for share in SHARES}
        tokens = metrics["tokens_asked"] / self.num_traces
        return {"start": before, **scores, "tokens_a_trace": tokens, **shares}


def byte_level(texts: Sequence[str], num_merges: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template and the end tokens of the built-in pair."""
    special = [PAD, TURN_START, TURN_END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(special) + len(alphabet) + num_merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def rebuild(tokenizer: Any, out: Path) -> None:
    """Write the built-in student with the rows of another tokenizer."""
    model, symbols = load_model(STUDENT), load_tokenizer(STUDENT)
    old = model.get_input_embeddings().weight.clone()
    spelled, generator = TokenBytes(tokenizer), torch.Generator().manual_seed(0)
    new = torch.randn(len(tokenizer), old.shape[1], generator=generator) * old.std()
    for token in range(len(tokenizer)):
        ids = symbols.encode(spelled.of(token).decode(errors="replace"), add_special_tokens=False)
        if ids and symbols.unk_token_id not in ids:
            new[token] = old[ids].mean(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(new)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id = None
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def table_of(found: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """One row a tokenizer, and the keys."""
    own = [score - found[OWN]["start"] for score in found[OWN]["KD"]]
    rows, kept = [], {}
    for name, one in found.items():
        gains = [score - one["start"] for score in one["KD"]]
        ratios = [gain / other if other > 0 else 0.0 for gain, other in zip(gains, own, strict=True)]
        kept[name] = interval(ratios)
        shares = ["" if one[share] is None else f"{one[share]:.3f}" for share in SHARES]
        scores = [f"{one['start']:.3f}", *(shown(interval(one[arm]), 3) for arm in ("CE", "KD"))]
        rows.append([name, f"{one['tokens_a_trace']:.0f}", *scores, shown(kept[name], 3), *shares])
    columns = ["tokenizer", "tokens a trace", "start", "CE alone (95 %)", "KD alone (95 %)", "gain kept (95 %)"]
    means = {f"gain_kept_{name}": kept[name][0] for name in MERGES}
    keys = {"gain_kept": min(means.values()), **means, "gain_own": statistics.fmean(own)}
    return markdown([*columns, *(share.replace("_", " ") for share in SHARES)], rows), keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="same keys, a few steps, one seed, under 60 seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="directory of finished runs; a temporary one by default")
    parser.add_argument("--out", type=Path, help="directory for translated_cache.md and translated_cache.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    header = conditions(1, ("torch", "transformers", "tokenizers"))
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(options.scratch or Path(temporary), options.quick)
        seeds = range(1 if options.quick else options.seeds)
        found = {name: study.measure(name, seeds) for name in (OWN, *MERGES)}
    table, keys = table_of(found)
    publish("translated_cache", __doc__, header, table, finite(keys), finite(found), options.out)


if __name__ == "__main__":
    main()
