"""The public benchmarks that people report, by name: prompts, shots and metrics as lm-evaluation-harness has them.

    gsm8k      gsm8k: 5 shots from the training split, drawn for each problem by Random(1234)
    math-500   minerva_math500: 4 fixed shots
    aime24, aime25   no shots
    mmlu       mmlu_flan_cot_zeroshot, all subjects
    gpqa       gpqa_diamond_cot_zeroshot, choices shuffled by a seed
    ifeval     ifeval, scored by lm_eval, which has to be installed

Shots are turns of the chat, as the harness has them with a chat template; a description is the system's turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.evaluate.answers import extract_answer
from limbeck.evaluate.harness import GPQA_STRICT, MMLU_STRICT, choice_metrics, gsm8k_metrics
from limbeck.evaluate.shots import MINERVA_SHOTS
from limbeck.evaluate.tasks import Problem

Row = Mapping[str, Any]
Message = Mapping[str, str]
LETTERS = "ABCD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark: where its rows are, and how one becomes a question with its answer."""

    hub: str
    """Id of its data set at the Hugging Face hub."""
    subset: str | None
    split: str
    ask: Callable[[Row, random.Random], tuple[str, str | None, Mapping[str, Any]]]
    """A row and a source of chance -> question, reference, and what its metrics need."""
    show: Callable[[Row], str] | None = None
    """The answer of a row as a shot."""
    num_shots: int = 0
    shot_split: str | None = None
    """Where shots are drawn from; None where they are fixed."""
    fixed_shots: Sequence[Row] = ()
    describe: Callable[[Row], str] | None = None
    """The description in front of the chat."""
    measure: Callable[[Mapping[str, Any], str], dict[str, float]] | None = None
    """What `ask` gave and an answer -> the harness's metrics."""


def problems_from(
    benchmark: Benchmark, rows: Sequence[Row], shots: Sequence[Row], num_shots: int, seed: int
) -> list[Problem]:
    """The rows of a benchmark as problems.

    Args:
      rows: of its split.
      shots: of its shot split; not read where the shots are fixed or none.
      num_shots: how many stand in front of each problem.
      seed: of the draw of shots and of the order of choices; the harness has 1234.
    Raises: TraceFormatError for a row without the columns of the benchmark, or when there are too few shots.
    """
    chance, order = random.Random(seed), random.Random(seed)
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            question, reference, needed = benchmark.ask(row, order)
            turns = _shot_turns(benchmark, shots, num_shots, chance)
            system = [] if benchmark.describe is None else [{"role": "system", "content": benchmark.describe(row)}]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, TraceFormatError):
                raise
            keys = ", ".join(str(key) for key in row)[:200]
            raise TraceFormatError(
                f"row {number} is none of {benchmark.hub} ({type(error).__name__}: {error}); its columns are {keys}."
            ) from error
        messages = (*system, *turns, {"role": "user", "content": question})
        problems.append(
            Problem(messages=messages, reference=reference, key=f"{benchmark.hub}:{number}", metadata=needed)
        )
    return problems


def _shot_turns(benchmark: Benchmark, shots: Sequence[Row], count: int, chance: random.Random) -> list[Message]:
    if not count:
        return []
    if benchmark.show is None:
        raise TraceFormatError(f"{benchmark.hub} is asked without shots; set num_shots 0.")
    if benchmark.fixed_shots:
        chosen = list(benchmark.fixed_shots[:count])
    elif count > len(shots):
        raise TraceFormatError(
            f"{count} shots are asked for, and its split {benchmark.shot_split} has {len(shots)} rows."
        )
    else:
        chosen = chance.sample(list(shots), count)
    turns: list[Message] = []
    for shot in chosen:
        turns.append({"role": "user", "content": benchmark.ask(shot, random.Random(0))[0]})
        turns.append({"role": "assistant", "content": benchmark.show(shot)})
    return turns


def _ask_gsm8k(row: Row, _: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    value = row["answer"].split("####")[-1].strip().replace(",", "")
    return f"Question: {row['question']}\nAnswer:", value, {"target": row["answer"]}


def _ask_math(row: Row, _: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    reference = row.get("answer") or extract_answer(row["solution"], "boxed")
    return f"Problem:\n{row['problem']}\n\nSolution:", reference, {}


def _ask_aime(row: Row, _: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    named = {key.lower(): value for key, value in row.items()}
    problem = named["problem"] if named.get("problem") is not None else named["question"]
    return f"Question: {problem}\nAnswer:", str(named["answer"]).strip(), {}


def _ask_mmlu(row: Row, _: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    choices = [str(choice) for choice in row["choices"]]
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    letter = LETTERS[int(row["answer"])] if str(row["answer"]) not in tuple(LETTERS) else str(row["answer"])
    question = f"Q: {row['question'].strip()}\n{listed}\nA: Let's think step by step."
    return question, letter, {"target": f"({letter})", "choices": choices}


def _ask_gpqa(row: Row, order: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    right = _gpqa_text(row["Correct Answer"])
    choices = [*(_gpqa_text(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3)), right]
    order.shuffle(choices)
    letter = LETTERS[choices.index(right)]
    listed = "\n".join(f"({name}) {choice}" for name, choice in zip(LETTERS, choices, strict=True))
    question = f"What is the correct answer to this question:{row['Question']}\nChoices:\n{listed}\n"
    return question + "Let's think step by step: ", letter, {"target": f"({letter})", "choices": choices}


def _gpqa_text(text: str | None) -> str:
    return " " if text is None else text.strip().replace(" [title]", ". ").replace("  ", " ")


def _ask_ifeval(row: Row, _: random.Random) -> tuple[str, str | None, Mapping[str, Any]]:
    needed = {name: row[name] for name in ("key", "instruction_id_list", "prompt", "kwargs")}
    return row["prompt"], None, needed


def _measure_ifeval(needed: Mapping[str, Any], text: str) -> dict[str, float]:
    # An optional package: lm_eval brings the checkers of the instructions.
    from lm_eval.tasks.ifeval.utils import process_results

    found = process_results(dict(needed), [text])
    names = ("prompt_level_strict_acc", "prompt_level_loose_acc")
    shares = {name: float(found[name]) for name in names}
    for name in ("inst_level_strict_acc", "inst_level_loose_acc"):
        shares[name] = sum(found[name]) / len(found[name])
    return shares


def _describe_mmlu(row: Row) -> str:
    subject = str(row.get("subject") or "various subjects").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        hub="openai/gsm8k",
        subset="main",
        split="test",
        ask=_ask_gsm8k,
        show=lambda row: str(row["answer"]),
        num_shots=5,
        shot_split="train",
        measure=lambda needed, text: gsm8k_metrics(text, needed["target"]),
    ),
    "math-500": Benchmark(
        hub="HuggingFaceH4/MATH-500",
        subset=None,
        split="test",
        ask=_ask_math,
        show=lambda row: str(row["solution"]),
        num_shots=4,
        fixed_shots=MINERVA_SHOTS,
    ),
    "aime24": Benchmark(hub="Maxwell-Jia/AIME_2024", subset=None, split="train", ask=_ask_aime),
    "aime25": Benchmark(hub="math-ai/aime25", subset=None, split="test", ask=_ask_aime),
    "mmlu": Benchmark(
        hub="cais/mmlu",
        subset="all",
        split="test",
        ask=_ask_mmlu,
        describe=_describe_mmlu,
        measure=lambda needed, text: choice_metrics(
            text, needed["target"], needed["choices"], MMLU_STRICT, ("</s>", "Q:", "<|im_end|>")
        ),
    ),
    "gpqa": Benchmark(
        hub="Idavidrein/gpqa",
        subset="gpqa_diamond",
        split="train",
        ask=_ask_gpqa,
        measure=lambda needed, text: choice_metrics(text, needed["target"], needed["choices"], GPQA_STRICT, ("</s>",)),
    ),
    "ifeval": Benchmark(hub="google/IFEval", subset=None, split="train", ask=_ask_ifeval, measure=_measure_ifeval),
}
