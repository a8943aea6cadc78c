"""What a teacher of another tokenizer is worth, beside one of the student's own: gain over the start, over seeds.

One student, tiny-student trained further on the text of some whole traces of builtin:chain, which is its start; then,
on other traces, by KD alone (forward KL to a cache), or by CE alone. It has a symbol a token, and so has `own`, the
built-in teacher. `merged` is the built-in teacher with another tokenizer, byte-level BPE with GPT-2's splits learnt on
the traces: its tokens (" 7", half words, bytes) hold several of the student's, or lie several in one. Its rows are
means of the symbols that they spell, or noise; then it was trained on the text of further traces, twice from the full
rate on.

Score: share of held-out problems answered right, greedy; seeds differ in the order of the traces. `gain_kept`: gain of
KD from `merged` over the start, over the gain of KD from `own` with the same seed, in the mean. Reach: 0.9.

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

TEACHER, STUDENT, OWN, OTHER = "tiny-teacher", "tiny-student", "own", "merged"
NUM_MERGES = 60
STEPS = {"chain_min_steps": 4, "chain_max_steps": 6}
HELD_OUT_SEED = 1_000_001
SHARES = ("vocabulary_matched", "positions_same_start", "positions_over_several", "mass_exact", "mass_open")


class Study:
    """The sizes, and the directory of finished runs."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch = scratch
        self.warmup_steps, self.teacher_epochs = (2, 0.1) if quick else (100, 2.0)
        self.num_traces, self.num_problems = (40, 10) if quick else (600, 200)

    def traces(self, seed: int, count: int | None = None) -> dict[str, Any]:
        """Worked problems, other ones for each seed."""
        return {"source": "builtin:chain", "num_traces": count or self.num_traces, "seed": seed, **STEPS}

    def start(self) -> str:
        """The student, trained on the text of some whole traces."""
        raw = self.scratch / "raw-own"
        if not (raw / "tokenizer.json").exists():
            rebuild(STUDENT, load_tokenizer(STUDENT), raw)
        return self.trained(str(raw), "start-own", 60, max_steps=self.warmup_steps, batch_size=8)

    def teacher(self, name: str) -> str:
        """The built-in teacher, or the one that was given another tokenizer."""
        if name == OWN:
            return TEACHER
        raw = self.scratch / f"raw-teacher-{name}"
        if not (raw / "tokenizer.json").exists():
            texts = read_traces(TraceConfig(**self.traces(50)))[0]
            written = [f"{trace.messages[-1]['content']}\n{trace.cot}\n{trace.answer}" for trace in texts]
            rebuild(TEACHER, byte_level(written), raw)
        model = str(raw)
        for stage, seed in enumerate((70, 71)):
            traces, place = self.traces(seed, 2000), f"teacher-{name}{'-again' * stage}"
            model = self.trained(model, place, seed, traces=traces, epochs=self.teacher_epochs, batch_size=16)
        return model

    def trained(
        self,
        student: str,
        name: str,
        traces_seed: int,
        *,
        seed: int = 0,
        cache: Path | None = None,
        traces: dict[str, Any] | None = None,
        **training: Any,
    ) -> str:
        """A student trained by KD alone, or without a cache by CE alone."""
        tree = {
            "student": {"model": student},
            "teacher": {"cache": None if cache is None else str(cache)},
            "traces": traces or self.traces(traces_seed),
            "num_validation": 0,
            "loss": {"kd_ratio": 0.0 if cache is None else 1.0},
            "training": {"epochs": 1.0, "seed": seed, **training},
            "optimizer": {"learning_rate": 1.5e-3, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        }
        return str(go_on(DISTILL, build(DistillConfig, tree), self.scratch / name).path)

    def cache(self, name: str, start: str) -> Path:
        """What a teacher says, in the student's tokens."""
        out = self.scratch / f"cache-{name}"
        tree = {
            "teacher": self.teacher(name),
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

    def measure(self, name: str, start: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Scores of the students of a teacher, and what its cache says of itself."""
        cache = self.cache(name, start)
        models = [self.trained(start, f"{name}-KD-{n}", 61, seed=n, cache=cache, batch_size=8) for n in seeds]
        metrics = Checkpoint(cache).metrics
        shares = {share: metrics.get(share) for share in SHARES}
        return {"teacher": self.score(self.teacher(name)), "scores": [self.score(model) for model in models], **shares}

    def text_alone(self, start: str, seeds: Sequence[int]) -> list[float]:
        """Scores of the students that learn from the text."""
        return [self.score(self.trained(start, f"own-CE-{n}", 61, seed=n, batch_size=8)) for n in seeds]


def byte_level(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template and the end tokens of the built-in pair."""
    special = [PAD, TURN_START, TURN_END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(special) + len(alphabet) + NUM_MERGES
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def rebuild(name: str, tokenizer: Any, out: Path) -> None:
    """Write a built-in model with the rows of another tokenizer."""
    model, symbols = load_model(name), load_tokenizer(name)
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


def table_of(start: float, text: Sequence[float], found: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """One row an arm, and the keys."""
    own = [score - start for score in found[OWN]["scores"]]
    rows = [["start", "", f"{start:.3f}", "", *[""] * len(SHARES)]]
    rows.append(["CE alone", "", shown(interval(text), 3), kept_of(text, start, own), *[""] * len(SHARES)])
    for name, one in found.items():
        shares = ["" if one[share] is None else f"{one[share]:.3f}" for share in SHARES]
        score = shown(interval(one["scores"]), 3)
        rows.append([f"KD, {name}", f"{one['teacher']:.3f}", score, kept_of(one["scores"], start, own), *shares])
    columns = ["students of", "teacher's score", "score (95 %)", "gain kept (paired, lowest to highest)"]
    gain = statistics.fmean(found[OTHER]["scores"]) - start
    kept = gain / statistics.fmean(own) if any(own) else 0.0
    keys = {"gain_kept": kept, "gain": gain, "gain_own": statistics.fmean(own)}
    return markdown([*columns, *(share.replace("_", " ") for share in SHARES)], rows), keys


def kept_of(scores: Sequence[float], start: float, own: Sequence[float]) -> str:
    """The share of the own teacher's gains that some scores keep: of the means, and of the seeds apart."""
    ratios = [(score - start) / gain for score, gain in zip(scores, own, strict=True) if gain > 0]
    if len(ratios) < len(own):
        return "-"
    mean = (statistics.fmean(scores) - start) / statistics.fmean(own)
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


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
        start = study.start()
        found = {name: study.measure(name, start, seeds) for name in (OWN, OTHER)}
        before, text = study.score(start), study.text_alone(start, seeds)
    table, keys = table_of(before, text, found)
    details = {"start": before, "CE alone": text, **found}
    publish("translated_cache", __doc__, header, table, finite(keys), details, options.out)


if __name__ == "__main__":
    main()
