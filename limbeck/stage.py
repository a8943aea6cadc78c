"""What a command is: one value that the command line, the Python library, a dry run and the pipeline read.

    Stage   a config and a directory in, a finished `Checkpoint` out
    View    a config in, an answer out; nothing is written

Both take their fields under the same names everywhere; see `flags.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from limbeck.checkpoint import Checkpoint, local_directory
from limbeck.config import build
from limbeck.errors import CheckpointError, ConfigError
from limbeck.flags import apply_fields
from limbeck.placement import asking
from limbeck.progress import say
from limbeck.yaml_values import read_recipe

Place = Literal["local", "ray"]
"""Where the parts of a job run: in this process and its children, or as tasks of a Ray cluster."""


PLACING = ("device", "dtype")
"""Options of commands that compute with models; see `placement`."""


@dataclass(frozen=True, slots=True)
class How:
    """How a stage is carried out: nothing that changes what it makes."""

    overwrite: bool = False
    """Replace an existing output, once the new one is complete."""
    resume: bool = False
    """Go on with an interrupted run; it ends with the same bits."""
    on: Place = "local"
    """Where the parts of the job run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A command that writes a directory."""

    name: str
    """As on the command line."""
    config: Any
    """Its fields are the flags, and the keywords of the function."""
    run: Callable[..., Checkpoint]
    """run(config, out, *, how) -> Checkpoint."""
    takes: tuple[str, ...] = ("overwrite",)
    """Which fields of `How` mean something to it."""
    inputs: Callable[[Any], Mapping[str, str]] | None = None
    """inputs(config) -> hash of everything that it reads, by role, as its manifest has it."""
    predict: Callable[..., Any] | None = None
    """predict(config, *, hardware) -> what it will cost, one prediction or several; reads no weights."""
    tell: Callable[..., None] | None = None
    """tell(config, out, as_json=...) prints what `--dry-run` asks for; None: the table of what it predicts."""
    subject: str | None = None
    """Field that a first argument without a name sets."""
    first: tuple[str, ...] = ()
    """Fields that people change, for the first page of help; none: all."""
    refers: Mapping[str, str] = field(default_factory=dict)
    """Fields that hold the recipe of another command -> that command; help does not repeat its fields."""
    shows: str = ""
    """module:function(checkpoint) that prints its output for people, ahead of its metrics; empty: there is none."""
    loads: bool = True
    """Whether it computes with models, on a device and in a number format."""

    @property
    def options(self) -> tuple[str, ...]:
        """What it takes beside its fields."""
        return (
            "out",
            *self.takes,
            *(PLACING if self.loads else ()),
            *(("dry_run",) if self.predict or self.tell else ()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A command that answers and writes nothing."""

    name: str
    """As on the command line."""
    config: Any
    """Its fields are the flags, and the keywords of the function."""
    run: Callable[[Any], Any]
    """run(config) -> the answer, a mapping or what `as_dict` makes one of."""
    show: Callable[[Any], None] | None = None
    """Prints the answer for people; None: a line a value."""
    as_dict: Callable[[Any], Mapping[str, Any]] = dict
    """The answer as plain values, for `--json`."""
    predict: Callable[[Any], Any] | None = None
    """What `--dry-run` answers."""
    subject: str | None = None
    """Field that a first argument without a name sets."""
    takes_many: bool = False
    """Whether the subject is a list, which takes all arguments without a name."""
    first: tuple[str, ...] = ()
    """Fields that people change, for the first page of help; none: all."""
    refers: Mapping[str, str] = field(default_factory=dict)
    """Fields that hold the recipe of another command -> that command; help does not repeat its fields."""
    reads: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Makes the command's own recipe of one that may be another command's."""
    loads: bool = False
    """Whether it computes with models, on a device and in a number format."""

    @property
    def options(self) -> tuple[str, ...]:
        """What it takes beside its fields."""
        return (*(PLACING if self.loads else ()), *(("dry_run",) if self.predict else ()))


_OPTIONS = ("out", "overwrite", "resume", "on", *PLACING, "dry_run")


def call(command: Stage | View, subjects: Sequence[Any], fields: Mapping[str, Any]) -> Any:
    """Carry out a command as a function: `subjects` without names, `fields` by name; see `function_of`."""
    rest = dict(fields)
    names = [name for name in _OPTIONS if name not in command.config.__dataclass_fields__]
    options = {name: rest.pop(name) for name in names if name in rest}
    where = f"limbeck.{function_name(command.name)}"
    config = build(command.config, tree_of(command, subjects, rest, where), where)
    for name in options:
        if name not in command.options:
            raise ConfigError(f"{where}: {name} means nothing here; leave it out.")
    if options.pop("dry_run", False):
        assert command.predict is not None
        return command.predict(config)
    with asking(*(options.pop(name, None) for name in PLACING)):
        if isinstance(command, View):
            return command.run(config)
        out = local_directory(options.pop("out", default_out(command.name)))
        return command.run(config, out, how=How(**options))


def tree_of(command: Stage | View, subjects: Sequence[Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config's tree: a subject may be a recipe, a checkpoint, a path, a config or text."""
    if len(subjects) == 1 and isinstance(subjects[0], command.config):
        return _whole(subjects[0], fields, where)
    tree: Mapping[str, Any] = {}
    if subjects and is_recipe(command, plain(subjects[0])):
        tree, subjects = recipe_of(command, plain(subjects[0])), subjects[1:]
    given = _subject(command, subjects, where) if subjects else []
    given += [(name, plain(value), f"{where}: {name}") for name, value in fields.items()]
    return apply_fields(command.config, tree, given)


def _subject(command: Stage | View, subjects: Sequence[Any], where: str) -> list[tuple[str, Any, str]]:
    """What stands without a name, as the field that it sets."""
    if command.subject is None:
        raise ConfigError(f"{where}: takes a recipe and fields by name; found {subjects[0]!r}.")
    if isinstance(command, View) and command.takes_many:
        subjects = [list(subjects)]
    if len(subjects) > 1:
        raise ConfigError(f"{where}: takes one {command.subject}; found {len(subjects)}.")
    return [(command.subject, plain(subjects[0]), where)]


def is_recipe(command: Stage | View, subject: Any) -> bool:
    """Whether what stands first names a recipe; where a command has no subject, nothing else can."""
    return isinstance(subject, str) and (command.subject is None or subject.endswith((".yaml", ".yml")))


def recipe_of(command: Stage | View, file: str) -> dict[str, Any]:
    """The tree of a recipe, made the command's own where it may be another command's.

    Raises: ConfigError when it is missing or no mapping.
    """
    reads = command.reads if isinstance(command, View) else dict
    return dict(reads(read_recipe(Path(file))))


def _whole(config: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    if fields:
        raise ConfigError(f"{where}: a whole config is given; set {', '.join(fields)} in it.")
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def plain(value: Any) -> Any:
    """A value of a field as a recipe would have it: text for a path or a checkpoint."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def default_out(name: str) -> Path:
    """Where a command writes unless told otherwise."""
    return Path("runs") / name.replace(" ", "-")


def function_name(name: str) -> str:
    """The function of a command: of two words, the verb and what it does it to."""
    words = name.split()
    return _VERBS.get(name) or "_".join(reversed(words))


_VERBS = {
    "rank train": "train_ranker",
    "rank recover": "recover_ranker",
    "rank evaluate": "evaluate_ranker",
    "rank cache": "cache_ranker",
    "rank show": "show_ranking",
    "traces stats": "count_traces",
    "traces advise": "advise_cut",
    "teacher stats": "describe_teacher_cache",
    "teacher verify": "verify_teacher_cache",
    "teacher export": "export_teacher_cache",
    "teacher import": "import_teacher_cache",
    "bench serve": "bench_server",
    "evaluate show": "show_evaluation",
}


def go_on(stage: Stage, config: Any, out: Path) -> Checkpoint:
    """The output of a stage, made only where it is not there: an interrupted attempt goes on, another config's goes."""
    assert stage.inputs is not None, f"{stage.name} does not say what it reads"
    if Checkpoint(out).is_made_of(config, stage.inputs(config)):
        return Checkpoint(out)
    try:
        return stage.run(config, out, how=How(overwrite=True, resume="resume" in stage.takes))
    except CheckpointError as error:
        if "resume" not in stage.takes:
            raise
        say(f"starting anew: {error}")
        return stage.run(config, out, how=How(overwrite=True))
