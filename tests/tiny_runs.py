"""Small distillation runs for tests: models of width 16, a dozen traces of the built-in task, a second or two each."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from limbeck.config import build, to_dict
from limbeck.distill import train
from limbeck.distill.borders import borders_of
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import Data, prepare
from limbeck.distill.microbatch import MicroBatch, StepLoss, Student, step_totals
from limbeck.distill.objective import Distillation
from limbeck.distill.pair import load_student, load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.flags import set_field
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.tiny import symbol_tokenizer
from limbeck.stage import How
from limbeck.traces.batch import Example, collate

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
CPU = torch.device("cpu")


def run_config(changes: Mapping[str, Any] | None = None) -> DistillConfig:
    """A run over a dozen short traces; `changes` are dotted paths and values, None takes a group out."""
    tree: dict[str, Any] = {
        "student": {"scratch": {**SHAPE, "seed": 1}},
        "traces": {"source": "builtin:chain", "num_traces": 12, "chain_min_steps": 1, "chain_max_steps": 3},
        "num_validation": 3,
        "training": {"batch_size": 3, "max_steps": 4, "seed": 5},
        "optimizer": {"learning_rate": 1e-3},
    }
    for path, value in (changes or {}).items():
        set_field(DistillConfig, tree, path, value, flag=path)
        if path == "student.model":
            tree["student"].pop("scratch", None)
    return build(DistillConfig, tree)


def save_model(
    directory: Path,
    *,
    kind: str = "llama",
    tied: bool = True,
    kv_heads: int = 2,
    vocab_size: int = 56,
    sharpness: float = 1.0,
    seed: int = 7,
    **sizes: int,
) -> str:
    """Write a random model with the built-in tokenizer; `sharpness` scales the head, so that its logits spread."""
    shape = {**SHAPE, **sizes}
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": kv_heads,
        "intermediate_size": shape["intermediate_size"],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
    }
    config = LlamaConfig(**settings) if kind == "llama" else Qwen3Config(**settings, head_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(directory)
    symbol_tokenizer().save_pretrained(directory)
    return str(directory)


class PulledPlug(BaseException):
    """Stands for a kill between two steps."""


def pull_plug(monkeypatch: Any, config: DistillConfig, out: Path, number: int) -> None:
    """Train, and break off within step `number`, counted from 0."""
    whole_step = train._step

    def step(setup: Any, now: int) -> Any:
        if now == number:
            raise PulledPlug
        return whole_step(setup, now)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", step)
        try:
            train.run(config, out)
        except PulledPlug:
            return
    raise AssertionError(f"training ended before step {number}")


@dataclass
class Stepped:
    """One step's outcome."""

    loss: float
    ce: float
    kd: float
    gradients: dict[str, Tensor]
    ledger: Ledger
    data: Data
    counted_flops: int
    model: Any = field(repr=False)


def one_step(
    config: DistillConfig,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    prepare_student: Callable[[Any], None] | None = None,
    is_counted: bool = False,
) -> Stepped:
    """Gradient of one step over all training examples, in the given micro-batches (all at once by default)."""
    student, tokenizer = load_student(config, None)
    teacher = load_teacher(config, Ranks(0, 1, CPU))
    if prepare_student is not None:
        prepare_student(student)
    student.train()
    data = prepare(config, tokenizer)
    totals = step_totals(data.train, config.loss.normalization)
    borders = borders_of(config.supervision.borders, tokenizer, config.render)
    wanted = StepLoss(config.loss, config.kd_ratio, totals, config.supervision.select, borders)
    ledger = Ledger()
    ce = kd = 0.0
    counter = flop_counter()
    for group in groups or [range(len(data.train))]:
        examples = [data.train[i] for i in group]
        batch = collate(examples, config.training.layout, tokenizer.pad_token_id)
        with counter if is_counted else torch.enable_grad():
            given = MicroBatch(Student.of(student, tokenizer), teacher, batch, examples, wanted, ledger)
            loss = Distillation()(given)
            if loss is not None:
                loss.total.backward()
                ce, kd = ce + float(loss.ce_sum), kd + float(loss.kd_sum)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    counted = counter.get_total_flops() if is_counted else 0
    return Stepped(ce + kd, ce, kd, gradients, ledger, data, counted, student)


def assert_same_gradients(one: Stepped, other: Stepped, atol: float = 2e-7) -> None:
    assert one.gradients.keys() == other.gradients.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in one.gradients.values())
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: n + m)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """`function` in a fresh process, forked from a server that has imported the stage and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.distill.train"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def train_in_process(tree: dict[str, Any], out: Path, resume: bool = False) -> None:
    """What a child process runs."""
    torch.set_num_threads(1)
    train.run(build(DistillConfig, tree), out, how=How(resume=resume))


def train_as_rank(tree: dict[str, Any], out: Path, rank: int, world_size: int, port: int) -> None:
    """What a child process runs as one rank under torchrun's environment."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    train_in_process(tree, out)
    torch.distributed.destroy_process_group()


def train_on_ranks(config: DistillConfig, out: Path, world_size: int = 2) -> None:
    """Run `config` on several gloo processes and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(train_as_rank, to_dict(config), out, rank, world_size, port) for rank in range(world_size)]
    join_all(processes)


def join_all(processes: Iterable[Any], timeout_seconds: float = 240.0) -> None:
    for process in processes:
        process.join(timeout_seconds)
        assert process.exitcode == 0, f"exit code {process.exitcode}"


def tokens_of(examples: Sequence[Example]) -> list[list[int]]:
    return [example.sample.input_ids.tolist() for example in examples]
