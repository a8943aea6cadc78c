"""The setting of older benchmarks: the built-in teacher's traces of builtin:chain, and a novice as the student."""

from __future__ import annotations

from pathlib import Path

from limbeck.config import build
from limbeck.demo import DemoConfig, write_answers
from limbeck.distill.config import DistillConfig
from limbeck.engine.sampling import SeededSampling
from limbeck.evaluate.run import EvaluateConfig
from limbeck.sweep.plan import SweepConfig
from limbeck.traces.sources import TraceConfig
from limbeck.traces.synthetic import DERIVATION_PATTERN, generate

TEACHER, STUDENT = "tiny-teacher", "tiny-student"
HELD_OUT_SEED = 1_000_001


def sample_traces(size: DemoConfig, out: Path) -> Path:
    """Traces of chains of 4 to 6 steps that the teacher answered right; no prompt is among the held-out ones."""
    taken = {problem.prompt_key for problem in generate(size.num_problems, size.seed + HELD_OUT_SEED, 4, 6)}
    problems = [problem for problem in generate(size.num_traces, size.seed, 4, 6) if problem.prompt_key not in taken]
    sampling = SeededSampling(max_new_tokens=320, temperature=0.7, seed=size.seed)
    return write_answers(problems, TEACHER, sampling, size, out)


def sweep_config(size: DemoConfig, traces: Path) -> SweepConfig:
    """Two passes over them, and how their students are scored."""
    distill = build(
        DistillConfig,
        {
            "student": {"model": STUDENT},
            "teacher": {"model": TEACHER},
            "traces": {"source": str(traces)},
            "num_validation": max(4, size.num_traces // 32),
            "render": {"derivation_pattern": DERIVATION_PATTERN},
            "training": {"epochs": 2.0, "batch_size": 16, "seed": size.seed},
            "optimizer": {"learning_rate": 1.5e-3, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        },
    )
    return SweepConfig(
        distill=distill,
        problems=TraceConfig(source="builtin:chain", num_traces=size.num_problems, seed=size.seed + HELD_OUT_SEED),
        grid={"lead_fraction": [1.0]},
        evaluate=EvaluateConfig(max_new_tokens=320, temperature=0.0, batch_size=300),
    )
