"""One run on an accelerator, in one process, of what can only be measured there: useful whenever it is cut off.

Results are written as they come, a line each to `results.jsonl`, and `results.md` is made anew after each. In order:

    smoke    one training step and one text
    tests    `pytest -m gpu`: the contracts of all stages on the device
    loss     forward KL at three vocabularies: the kernels, the plain loss, the bare products, Liger, TRL
    steps    training steps of 8,192 and 16,384 tokens: limbeck, TRL's GKD with and without Liger; memory, MFU
    sampler  texts of 32 and 300 rows: limbeck, transformers' generate
    sweep    5 lead fractions x 3 seeds x 2 tasks, trained to the same number of tokens and scored

A part that no longer fits into the budget is left out, by what the one before it of its kind took. MFU is FLOPs of the
ledger a second over those of plain bf16 products of the model's shapes in the same process. Peers that are not
installed are left out.

`make gpu-bundle` collects what a machine without internet needs; there:

    bash bundle/run.sh 300 results    # joins the model, installs the wheels, and calls this file

    python benchmarks/gpu_check.py --dry --budget 120    # the same control flow on a CPU, tiny and without meaning
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import limbeck
from limbeck.config import build
from limbeck.distill import device_loss, train
from limbeck.distill.config import DistillConfig
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.distill.parallel import join
from limbeck.distill.rows import Terms
from limbeck.distill.step_work import Feed
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.models.load import GGUF_ALIASES, load_model, load_tokenizer
from limbeck.models.placement import here
from limbeck.stage import How
from limbeck.teacher.dense import DenseTargets

Result = dict[str, Any]


class Check(NamedTuple):
    """What a part is given."""

    model: str
    out: Path
    is_dry: bool
    ends: float
    """Of the budget, on the clock of time.monotonic."""

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def device(self) -> torch.device:
        return here().device


def seconds_of(check: Check, call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after two that are not measured."""
    times = []
    for _ in range(2 + (1 if check.is_dry else repeats)):
        _wait(check.device)
        start = time.perf_counter()
        call()
        _wait(check.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def smoke(check: Check) -> Iterator[Result]:
    """Whether anything works at all."""
    start = time.perf_counter()
    run = run_of(check, 1024, steps=2)
    rows = [train._step(run, number).row() for number in range(2)]
    yield {"name": "two steps", "seconds": time.perf_counter() - start, "losses": [row["loss"] for row in rows]}
    start = time.perf_counter()
    found = complete(load_model(check.model), [[1, 2, 3]], SamplingConfig(max_new_tokens=16), [])
    yield {"name": "one text", "seconds": time.perf_counter() - start, "tokens": len(found[0][0].token_ids)}


def tests(check: Check) -> Iterator[Result]:
    """The contracts of the suite that need a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command += ["--collect-only"] if check.is_dry else []
    limit = max(10.0, min(90.0, 0.4 * check.left))
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        code, text = found.returncode, found.stdout[-4000:]
    except subprocess.TimeoutExpired as error:
        cut = error.stdout or b""  # bytes, whatever was asked for
        code, text = 124, (cut if isinstance(cut, str) else cut.decode("utf-8", "replace"))[-4000:]
    (check.out / "tests.txt").write_text(text, encoding="utf-8")
    yield {"name": "pytest -m gpu", "code": code, "last line": text.strip().splitlines()[-1:]}


SHAPES = {49_152: (576, 576), 128_256: (2048, 4096), 151_936: (1024, 2048)}


def loss(check: Check) -> Iterator[Result]:
    """Forward KL from hidden states to all gradients."""
    for vocab, (width, teacher_width) in SHAPES.items():
        rows = 64 if check.is_dry else 8192
        if check.is_dry:
            vocab, width, teacher_width = vocab // 100, 16, 24
        given = _states(check.device, rows, vocab, width, teacher_width)
        bare = seconds_of(check, lambda given=given: _products(*given))
        for name, method in _losses(check).items():
            if check.left < 10 * bare:
                return
            yield {"name": name, "vocabulary": vocab, "rows": rows, **_measured(check, method, given, bare)}


def _measured(check: Check, method: Callable[..., Any], given: tuple[Any, ...], bare: float) -> Result:
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(check.device)
    try:
        seconds = seconds_of(check, lambda: method(*given))
    except Exception as error:  # a peer that does not run here is no reason to end
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {"seconds": seconds, "over bare products": seconds / bare, "peak_bytes": _peak(check.device)}


def _states(device: torch.device, rows: int, vocab: int, width: int, teacher_width: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (vocab, width), (rows, teacher_width), (vocab, teacher_width))
    made = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    head, teacher_head = (m.mul_(2 / math.sqrt(m.shape[1])) for m in (made[1], made[3]))
    frozen = (x.bfloat16() for x in (made[2], teacher_head))
    labels = torch.randint(0, vocab, (rows,), generator=random).to(device)
    return made[0].requires_grad_(), head.requires_grad_(), *frozen, labels


def _products(hidden: Any, head: Any, teacher: Any, teacher_head: Any, _: Any) -> None:
    """The four products that no loss can do without."""
    with torch.no_grad():
        states, weight = hidden.bfloat16(), head.bfloat16()
        logits = states @ weight.T
        _ = teacher @ teacher_head.T
        _, _ = logits @ weight, logits.T @ states


def _ours(hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any) -> None:
    hidden.grad = head.grad = None
    rows = len(hidden)
    none, coef = hidden.new_zeros(rows), hidden.new_full((rows,), 1 / rows)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        found = fused_loss(
            hidden,
            head,
            labels,
            ce_coef=none,
            kd_coef=coef,
            targets=DenseTargets(teacher, teacher_head),
            divergence=DivergenceConfig(),
            terms=Terms(False, True),
        )
    found.total.backward()


def _plain(*given: Any) -> None:
    """The same without the kernels."""
    takes, device_loss.takes = device_loss.takes, lambda *_: False  # type: ignore[assignment]
    try:
        _ours(*given)
    finally:
        device_loss.takes = takes


def _losses(check: Check) -> dict[str, Callable[..., None]]:
    found: dict[str, Callable[..., None]] = {"limbeck": _ours, "limbeck without kernels": _plain}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def liger(hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any) -> None:
            hidden.grad = head.grad = None
            method = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
            method(hidden.bfloat16(), head.bfloat16(), teacher, teacher_head, labels).backward()

        found["liger"] = liger
    except ImportError:
        pass
    try:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def trl(hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any) -> None:
            hidden.grad = head.grad = None
            mask = torch.ones(1, len(hidden), device=hidden.device)
            rows = hidden.bfloat16()[None]
            _chunked_divergence_loss(rows, teacher[None], head.bfloat16(), teacher_head, mask, beta=0.0)[0].backward()

        found["trl chunked"] = trl
    except ImportError:
        pass
    return found


def config_of(check: Check, tokens: int, **changes: Any) -> DistillConfig:
    """Distillation of the model from itself over the built-in task."""
    chain = {"source": "builtin:chain", "num_traces": 40 if check.is_dry else 2000}
    tree: dict[str, Any] = {
        "student": {"model": check.model},
        "teacher": {"model": check.model},
        "traces": {**chain, "chain_min_steps": 4 if check.is_dry else 8, "chain_max_steps": 4 if check.is_dry else 16},
        "num_validation": 0,
        "training": {
            "batch_size": None,
            "batch_tokens": tokens,
            "microbatch_tokens": tokens,
            "max_steps": 12,
            "save_every_steps": 0,
            **changes.pop("training", {}),
        },
        **changes,
    }
    return build(DistillConfig, tree)


def run_of(check: Check, tokens: int, steps: int) -> Any:
    run = train.set_up(config_of(check, tokens, training={"max_steps": steps}), join())
    run.student.model.train()
    return run._replace(feed=Feed(run))


def steps(check: Check) -> Iterator[Result]:
    """Training at two sizes of a step."""
    for tokens in (256, 512) if check.is_dry else (8192, 16384):
        yield {"name": "limbeck", **_our_steps(check, tokens)}
        for use_liger in (False, True):
            if check.left < 40 and not check.is_dry:
                return
            name = "trl gkd + liger" if use_liger else "trl gkd"
            try:
                yield {"name": name, **_trl_steps(check, tokens, use_liger)}
            except Exception as error:  # as above
                yield {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}


def _our_steps(check: Check, tokens: int) -> Result:
    count = 3 if check.is_dry else 10
    run = run_of(check, tokens, steps=count + 2)
    for number in range(2):
        train._step(run, number).row()
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(check.device)
    before, flops = run.ledger.counts["tokens"], sum(run.ledger.flops.values())
    _wait(check.device)
    start = time.perf_counter()
    done = [train._step(run, number) for number in range(2, count + 2)]
    done[-1].row()
    _wait(check.device)
    seconds = time.perf_counter() - start
    rate, best = (sum(run.ledger.flops.values()) - flops) / seconds, _product_rate(check, run, tokens)
    found = {"tokens a step": tokens, "tokens/s": (run.ledger.counts["tokens"] - before) / seconds}
    return found | {"peak_bytes": _peak(check.device), "FLOP/s": rate, "mfu": rate / best}


def _product_rate(check: Check, run: Any, tokens: int) -> float:
    """FLOP/s of plain products in the training's type, of the shapes of a layer."""
    layer = run.student.model.get_decoder().layers[0]
    dtype = torch.bfloat16 if check.device.type == "cuda" else torch.float32
    pairs = []
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().to(dtype)
            pairs.append(
                (torch.randn(tokens, weight.shape[1], device=weight.device, dtype=dtype), weight.T.contiguous())
            )
    seconds = seconds_of(check, lambda: [x @ w for x, w in pairs])
    return sum(2.0 * len(x) * w.numel() for x, w in pairs) / seconds


def _trl_steps(check: Check, tokens: int, use_liger: bool) -> Result:
    import tempfile

    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer, run = load_tokenizer(check.model), run_of(check, tokens, steps=1)
    samples = [example.sample for example in run.data.train]
    mean = sum(map(len, samples)) / len(samples)
    batch, count = max(1, round(tokens / mean)), 3 if check.is_dry else 10
    samples = (samples * (1 + batch * (count + 2) // len(samples)))[: batch * (count + 2)]
    records = [
        {
            "prompt": tokenizer.decode(s.input_ids[s.segment_ids == 0]),
            "input_ids": s.input_ids.tolist(),
            "completion_mask": (s.segment_ids != 0).astype(int).tolist(),
        }
        for s in samples
    ]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(check.device)
            times.append(time.perf_counter())
            if len(times) == 2 and check.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(check.device)

    is_cuda = check.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        config = GKDConfig(
            output_dir=scratch,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=batch,
            max_steps=count + 2,
            bf16=is_cuda,
            use_cpu=not is_cuda,
            gradient_checkpointing=False,
            use_liger_kernel=use_liger,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        load = transformers.AutoModelForCausalLM.from_pretrained
        trainer = GKDTrainer(
            model=load(check.model, dtype=torch.float32),
            teacher_model=load(check.model, dtype=torch.bfloat16 if is_cuda else torch.float32),
            args=config,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(records),
            callbacks=[Clock()],
        )
        trainer.train()
    read = sum(map(len, samples[2 * batch :]))
    return {"tokens a step": tokens, "tokens/s": read / (times[-1] - times[1]), "peak_bytes": _peak(check.device)}


def sampler(check: Check) -> Iterator[Result]:
    """Greedy texts of one length."""
    limit = 16 if check.is_dry else 256
    model = load_model(check.model)
    for rows in (4, 8) if check.is_dry else (32, 300):
        prompts = [[1, *range(20, 20 + 8 + number % 5)] for number in range(rows)]
        config = SamplingConfig(max_new_tokens=limit, batch_size=rows)
        seconds = seconds_of(check, lambda prompts=prompts, config=config: complete(model, prompts, config, []), 3)
        yield {"name": "limbeck", "rows": rows, "tokens/s": rows * limit / seconds}
        if check.left < 3 * seconds:
            return
        yield {"name": "transformers", "rows": rows, "tokens/s": rows * limit / _generate(check, model, prompts, limit)}


def _generate(check: Check, model: Any, prompts: list[list[int]], limit: int) -> float:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=check.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=check.device)
    given = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": False, "pad_token_id": 0}
    return seconds_of(check, lambda: model.generate(input_ids=ids, attention_mask=mask, **given), 1)


FRACTIONS = (0.25, 0.4, 0.5, 0.75, 1.0)
TASKS = {"chain": "builtin:chain", "gsm": "reasoning-gym:gsm_symbolic"}


def sweep(check: Check) -> Iterator[Result]:
    """How much of a thought has to be trained on: the same number of tokens for every fraction."""
    longest = 0.0
    for seed in range(1 if check.is_dry else 3):
        for task, source in TASKS.items():
            for fraction in FRACTIONS[:2] if check.is_dry else FRACTIONS:
                if check.left < 1.3 * longest:
                    return
                start = time.monotonic()
                try:
                    yield {"name": task, "seed": seed, "lead fraction": fraction} | _arm(check, source, fraction, seed)
                except Exception as error:  # as above
                    told = f"{type(error).__name__}: {error}"[:300]
                    yield {"name": task, "seed": seed, "lead fraction": fraction, "failed": told}
                longest = max(longest, time.monotonic() - start)


def _arm(check: Check, source: str, fraction: float, seed: int) -> Result:
    count, tokens = (20, 600) if check.is_dry else (1024, 400_000)
    traces = {"source": source, "num_traces": count, "seed": 1}
    problems = {"source": source, "num_traces": 10 if check.is_dry else 300, "seed": 2}
    out = check.out / f"{source.partition(':')[2]}-{fraction}-{seed}"
    training = {"max_tokens": tokens, "max_steps": None, "seed": seed, "batch_size": 8 if check.is_dry else 32}
    training |= {"batch_tokens": None, "microbatch_tokens": 16_384}
    config = config_of(
        check,
        16_384,
        traces=traces,
        truncation={"policy": "lead", "lead_fraction": fraction} if fraction < 1 else {},
        training=training,
        teacher={},
    )
    done = train.run(config, out, how=How(overwrite=True))
    scored = limbeck.evaluate(
        str(out),
        problems=problems,
        max_new_tokens=32 if check.is_dry else 512,
        out=out.with_name(f"{out.name}.scored"),
        overwrite=True,
    )
    kept = ("accuracy", "accuracy_low", "accuracy_high", "mean_tokens")
    return {"train_seconds": done.cost["train_seconds"]} | {name: scored.metrics.get(name) for name in kept}


PARTS: dict[str, Callable[[Check], Iterator[Result]]] = {
    "smoke": smoke,
    "tests": tests,
    "loss": loss,
    "steps": steps,
    "sampler": sampler,
    "sweep": sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = "tiny-student" if arguments.dry else _unpacked(arguments.model, arguments.out)
    check = Check(model, arguments.out, arguments.dry, time.monotonic() + arguments.budget)
    results = arguments.out / "results.jsonl"
    results.write_text("", encoding="utf-8")
    _write(check, {"part": "machine", **_machine()})
    for part in arguments.only:
        if check.left < 5:
            _write(check, {"part": part, "left out": "the budget is used up"})
            continue
        try:
            for result in PARTS[part](check):
                _write(check, {"part": part, **result})
        except Exception:  # the next part may work
            _write(check, {"part": part, "failed": traceback.format_exc()[-1500:]})


def _unpacked(model: str, out: Path) -> str:
    """A model that is read in a moment, of one that is a GGUF file."""
    if model not in GGUF_ALIASES:
        return model
    directory = out / "model"
    if not directory.exists():
        load_model(model, torch.float32, device="cpu").save_pretrained(directory)
        load_tokenizer(model).save_pretrained(directory)
    return str(directory)


def _machine() -> Result:
    found: Result = {"torch": torch.__version__, "device": str(here().device), "dtype": str(here().dtype)}
    if here().is_accelerator:
        found["name"] = torch.cuda.get_device_name()
    return found


def _write(check: Check, result: Result) -> None:
    """One more line of the results, and the page anew."""
    result["seconds left"] = round(check.left, 1)
    print(json.dumps(result), flush=True)
    with (check.out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    lines = (check.out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    (check.out / "results.md").write_text(_page([json.loads(line) for line in lines]), encoding="utf-8")


def _page(results: list[Result]) -> str:
    """A table a part."""
    text = "# On an accelerator\n"
    for part in dict.fromkeys(result["part"] for result in results):
        rows = [{k: v for k, v in r.items() if k not in ("part", "seconds left")} for r in results if r["part"] == part]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text += f"\n## {part}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        text += "".join(f"| {' | '.join(_shown(row.get(name)) for name in names)} |\n" for row in rows)
    return text


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("\n", " ").replace("|", "/")[:300]


if __name__ == "__main__":
    main()
