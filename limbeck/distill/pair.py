"""Student and teacher: load them, and refuse a pair that cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from limbeck.checkpoint import Checkpoint
from limbeck.client import Client, api_key
from limbeck.distill.config import DistillConfig, TeacherConfig
from limbeck.distill.ensemble import SeveralTeachers
from limbeck.distill.objective import Teacher
from limbeck.errors import ConfigError, PairError
from limbeck.models.anatomy import Head, head_of
from limbeck.models.load import load_model, load_scratch, load_tokenizer, model_hash, vocabulary_size
from limbeck.teacher.cache import Spec, TeacherCache
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.served import check_tokenizer, connect


def load_student(config: DistillConfig, source: Checkpoint | None, tokenizer: Any = None) -> tuple[Any, Any]:
    """The student, ready to train (adapters on, recomputation on where asked), and its tokenizer.

    A student from scratch has the tokenizer that is given, or else the built-in one.
    """
    layout = config.training.layout
    name = str(source.path) if source is not None else config.student.model
    if name is not None:
        model, tokenizer = load_model(name, torch.float32, layout), load_tokenizer(name)
    else:
        assert config.student.scratch is not None
        model, tokenizer = load_scratch(config.student.scratch, layout, tokenizer)
    return trainable(model, config), tokenizer


def trainable(model: Any, config: DistillConfig) -> Any:
    """A student as the run trains it: recomputation on where asked, adapters added where asked."""
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is None:
        return model
    adapters = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            return peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:200]}") from error


def load_teacher(config: DistillConfig, device: torch.device) -> Teacher | None:
    """The teacher that the config names; None when neither the loss nor the validation has a KD term.

    Raises: PairError when a live teacher cannot read the ids of its own tokenizer, or a cache is of another teacher.
    """
    is_used = config.kd_ratio > 0 or config.on_policy is not None or config.training.keep_best == "kd"
    if not is_used or not config.has_teacher:
        return None
    teachers = [config.teacher, *config.teacher.others]
    loaded = [_load(teacher, config, device) for teacher in teachers]
    if len(loaded) == 1 and config.teacher.weight == 1.0:
        return loaded[0]
    return SeveralTeachers(tuple(loaded), tuple(teacher.weight for teacher in teachers))


def _load(teacher: TeacherConfig, config: DistillConfig, device: torch.device) -> Teacher:
    if teacher.server is not None:
        tokenizer = load_tokenizer(student_tokenizer_name(config))
        client = Client(teacher.server, teacher.client, api_key(teacher.client))
        served = connect(client, teacher.server_model, teacher.dialect, teacher.top_n, vocabulary_size(tokenizer))
        check_tokenizer(served, tokenizer)
        return served
    if teacher.cache is not None:
        return _open_cache(teacher, teacher.cache, device)
    assert teacher.model is not None
    model = load_model(teacher.model, torch.float32, config.training.layout)
    tokenizer = load_tokenizer(teacher.model)
    _check_vocabulary(f"teacher {teacher.model}", model, tokenizer)
    return LiveTeacher(model.to(device), vocabulary_size(tokenizer))


def student_tokenizer_name(config: DistillConfig) -> str:
    """The model whose tokenizer the student has; a student from scratch has the built-in one."""
    return config.student.model or "tiny-student"


def _open_cache(teacher: TeacherConfig, directory: Path, device: torch.device) -> TeacherCache:
    """The cache, with the head of its teacher where it holds hidden states."""
    spec = Spec.read(directory)
    name, needs_head = teacher.model or spec.teacher, spec.config.mode == "hidden"
    if (teacher.model is not None or needs_head) and model_hash(name) != spec.teacher_hash:
        raise PairError(
            f"{directory}: written with another teacher ({spec.teacher}, hash {spec.teacher_hash}) than {name} (hash "
            f"{model_hash(name)}); name that teacher, or write a cache of this one."
        )
    if not needs_head:
        return TeacherCache(directory)
    weight, bias = head_of(load_model(name, getattr(torch, spec.dtype)))
    weight, bias = weight.detach()[: spec.vocab_size], None if bias is None else bias.detach()[: spec.vocab_size]
    return TeacherCache(directory, Head(weight.to(device), None if bias is None else bias.to(device)))


def check_pair(config: DistillConfig, student: Any, tokenizer: Any) -> None:
    """Refuse a student that cannot read the tokenizer's ids, and a live teacher that reads other ids.

    Raises: PairError.
    """
    _check_vocabulary("student", student, tokenizer)
    for teacher in (config.teacher, *config.teacher.others):
        _check_teacher(teacher, tokenizer)


def _check_teacher(teacher: TeacherConfig, tokenizer: Any) -> None:
    if teacher.cache is not None and vocabulary_size(tokenizer) != Spec.read(teacher.cache).vocab_size:
        raise PairError(
            f"{teacher.cache}: of a vocabulary of {Spec.read(teacher.cache).vocab_size} tokens, the "
            f"student's has {vocabulary_size(tokenizer)}; token distillation needs one tokenizer."
        )
    if teacher.model is None:
        return
    other = load_tokenizer(teacher.model)
    if other.get_vocab() != tokenizer.get_vocab():
        differing = len(set(other.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
        raise PairError(
            f"teacher {teacher.model}: its tokenizer differs from the student's in {differing} entries; token "
            "distillation needs one tokenizer. Use a teacher of the same family, or train on its text (no teacher)."
        )


def _check_vocabulary(role: str, model: Any, tokenizer: Any) -> None:
    rows, needed = head_of(model).weight.shape[0], vocabulary_size(tokenizer)
    if needed > rows:
        raise PairError(
            f"{role}: the tokenizer has {needed} tokens, the model only {rows}; use the tokenizer that belongs to it."
        )
