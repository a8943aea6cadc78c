"""Whether the problems that a model is scored on are among the traces that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.errors import LimbeckError
from limbeck.evaluate.tasks import Problem
from limbeck.progress import say
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trained_on import trained_on


def count_seen(model: str, problems: Sequence[Problem]) -> int | None:
    """How many of the problems have a prompt that a training trace has; any are told on the console.

    Returns: None where it is not known: the model's manifest names no traces, or they cannot be read any more.
    """
    sources = list(trained_on(model))
    keys = [_prompts_of(model, source) for source in sources]
    if not keys or None in keys:
        return None
    trained = {key for found in keys if found is not None for key in found}
    count = sum(problem.key in trained for problem in problems)
    if count:
        say(
            f"note: {count} of {len(problems)} problems are among the traces that {model} was trained on "
            f"({', '.join(source.source for source in sources)}), so the score is not held out; use another seed, "
            "split or source."
        )
    return count


def _prompts_of(model: str, source: TraceConfig) -> set[str] | None:
    try:
        return {trace.prompt_key for trace in read_traces(source)[0]}
    except (LimbeckError, OSError) as error:
        reason = " ".join(str(error).split())
        say(f"note: the training traces of {model} cannot be read ({reason}); they may contain these problems.")
        return None
