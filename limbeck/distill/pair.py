"""Student and teacher: load them, and refuse a pair that cannot fit."""

from __future__ import annotations

from typing import Any

import peft
import torch

from limbeck.checkpoint import Checkpoint
from limbeck.distill.config import DistillConfig
from limbeck.distill.objective import Teacher
from limbeck.errors import ConfigError, PairError
from limbeck.models.anatomy import head_of
from limbeck.models.load import load_model, load_scratch, load_tokenizer, vocabulary_size
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.store import TargetStore


def load_student(config: DistillConfig, source: Checkpoint | None) -> tuple[Any, Any]:
    """The student, ready to train (adapters on, recomputation on where asked), and its tokenizer."""
    layout = config.training.layout
    name = str(source.path) if source is not None else config.student.model
    if name is not None:
        model, tokenizer = load_model(name, torch.float32, layout), load_tokenizer(name)
    else:
        assert config.student.scratch is not None
        model, tokenizer = load_scratch(config.student.scratch, layout)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is None:
        return model, tokenizer
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
            return peft.get_peft_model(model, adapters), tokenizer
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:200]}") from error


def load_teacher(config: DistillConfig, device: torch.device) -> Teacher | None:
    """The teacher that the config names; None when the loss has no KD term.

    Raises: PairError when a live teacher cannot read the ids of its own tokenizer.
    """
    if config.kd_ratio == 0:
        return None
    if config.teacher.model is not None:
        model = load_model(config.teacher.model, torch.float32, config.training.layout)
        tokenizer = load_tokenizer(config.teacher.model)
        _check_vocabulary(f"teacher {config.teacher.model}", model, tokenizer)
        return LiveTeacher(model.to(device), vocabulary_size(tokenizer))
    return TargetStore(config.teacher.targets) if config.teacher.targets is not None else None


def check_pair(config: DistillConfig, student: Any, tokenizer: Any) -> None:
    """Refuse a student that cannot read the tokenizer's ids, and a live teacher that reads other ids.

    Raises: PairError.
    """
    _check_vocabulary("student", student, tokenizer)
    if config.teacher.model is None:
        return
    other = load_tokenizer(config.teacher.model)
    if other.get_vocab() != tokenizer.get_vocab():
        differing = len(set(other.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
        raise PairError(
            f"teacher {config.teacher.model}: its tokenizer differs from the student's in {differing} entries; token "
            "distillation needs one tokenizer. Use a teacher of the same family, or train on its text (no teacher)."
        )


def _check_vocabulary(role: str, model: Any, tokenizer: Any) -> None:
    rows, needed = head_of(model).weight.shape[0], vocabulary_size(tokenizer)
    if needed > rows:
        raise PairError(
            f"{role}: the tokenizer has {needed} tokens, the model only {rows}; use the tokenizer that belongs to it."
        )
