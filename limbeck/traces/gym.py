"""Problems of the reasoning-gym package, seeded; `gsm_symbolic` comes with worked solutions."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.errors import ConfigError, nearest
from limbeck.traces.files import Located


def read_gym(task: str, num_traces: int, seed: int) -> Iterator[Located]:
    """`num_traces` problems of one task, each a record of question, answer and metadata.

    Raises: ConfigError for a task that does not exist, or that cannot be made without settings of its own.
    """
    # Imported here because it takes more than a second, which every other source is spared.
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(f"reasoning-gym:{task}: no such task; {nearest(task, DATASETS)}")
    where = f"reasoning-gym:{task} seed {seed}"
    try:
        problems = reasoning_gym.create_dataset(task, size=num_traces, seed=seed)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"reasoning-gym:{task}: cannot be made without settings: {reason}.") from error
    for number in range(num_traces):
        yield Located(f"{where} number {number}", problems[number])
