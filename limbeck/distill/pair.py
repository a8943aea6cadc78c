"""Student and teacher: load them, and refuse a pair that cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from limbeck.client import Client, api_key
from limbeck.distill.config import LoopConfig, TeacherConfig, teachers_of
from limbeck.distill.parallel import Ranks, make_mesh
from limbeck.errors import ConfigError, PairError
from limbeck.models.anatomy import Head, head_of
from limbeck.models.load import (
    load_model,
    load_scratch,
    load_tokenizer,
    model_hash,
    quantization_at,
    vocabulary_size,
)
from limbeck.models.parts import output_layer_of
from limbeck.models.placement import here
from limbeck.models.probe import ask
from limbeck.models.sharded import is_sharded, load_in_parts
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher.cache import Spec, TeacherCache
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.projected import head_hash
from limbeck.teacher.served import check_tokenizer, connect
from limbeck.teacher.several import OneTeacher, SeveralTeachers, Teacher
from limbeck.teacher.spelling import tokenizer_hash


def load_student(config: LoopConfig, tokenizer: Any = None) -> tuple[Any, Any]:
    """The student, ready to train (adapters on, recomputation on where asked), and its tokenizer.

    A student from scratch has the tokenizer that is given, or else the built-in one.
    """
    model, tokenizer = _start(config, tokenizer)
    return trainable(model, config), tokenizer


def load_student_in_parts(config: LoopConfig, ranks: Ranks) -> tuple[Any, Any, Any]:
    """The same with its parts on all processes, the student without storage (`load_in_parts`), and its tokenizer.

    Raises: ConfigError when it is quantised, or the processes cannot be grouped as the config says.
    """
    parallel, name = config.training.parallel, config.student.model
    mesh = make_mesh(ranks, parallel.shard_size, "shard_size")
    if name is not None:
        _refuse_quantized(name, "strategy")
    model, empty = load_in_parts(
        lambda: _start(config, None)[0],
        lambda model: trainable(model, config),
        mesh,
        ranks.device,
        products_of(config),
    )
    _refuse_uneven(config, "student", model)
    return model, empty, symbol_tokenizer() if name is None else load_tokenizer(name)


def _start(config: LoopConfig, tokenizer: Any) -> tuple[Any, Any]:
    """The weights that training starts from, and their tokenizer."""
    name = config.student.model
    if name is not None:
        return _laid_out(name, config, torch.float32), load_tokenizer(name)
    assert config.student.scratch is not None
    return load_scratch(config.student.scratch, config.training.layout, tokenizer)


def _laid_out(name: str, config: LoopConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A model for the layout of the batches.

    Raises: ConfigError for padded batches of a model that padding changes.
    """
    layout = config.training.layout
    model = load_model(name, dtype, layout, device=device)
    if layout == "padded" and not ask(model).pads:
        raise ConfigError(
            f"training.layout padded: padding changes what {name} computes; set packed, its sequences are "
            "then run one at a time."
        )
    return model


def products_of(config: LoopConfig) -> torch.dtype:
    """What the student is multiplied in, where this process computes."""
    return torch.bfloat16 if config.training.is_bf16(here().dtype == torch.bfloat16) else torch.float32


def _refuse_uneven(config: LoopConfig, role: str, model: Any) -> None:
    """Processes that share a model run it equally often, which sequences that cannot be packed would not allow."""
    verdict = ask(model)
    if config.training.layout == "packed" and verdict.way != "packed":
        raise ConfigError(
            f"{role}: is right {verdict.way} only ({verdict.reason}), and one in parts takes whole batches: set "
            + ("training.layout padded." if verdict.pads else "the strategy of training.parallel to replicate.")
        )


def _refuse_quantized(name: str, field: str) -> None:
    if quantization_at(name) is not None:
        raise ConfigError(f"{name}: a quantised model is not split into parts; set parallel.{field} replicate.")


def trainable(model: Any, config: LoopConfig) -> Any:
    """A student as the run trains it: recomputation on where asked, adapters added where asked."""
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not config.student.train_head:
        for part in head_of(model)[:2]:
            if part is not None:
                part.requires_grad_(False)
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
            adapted = peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:200]}") from error
    _refuse_adapted_ends(adapted)
    return adapted


def _refuse_adapted_ends(model: Any) -> None:
    """The loss reads the head's own weight, and shared embeddings would carry an adapter into it."""
    lm = model.get_base_model()
    for layer, what in ((output_layer_of(lm), "head"), (lm.get_input_embeddings(), "embeddings")):
        if hasattr(layer, "lora_A"):
            raise ConfigError(
                f"lora.target_modules: chooses the {what}, whose adapter would not be trained; leave it out (the "
                "default adapts the layers between them)."
            )


def load_teacher(config: LoopConfig, ranks: Ranks) -> Teacher | None:
    """The teacher that the config names; None when neither the loss nor the validation has a KD term.

    Raises: PairError when a live teacher cannot read the ids of its own tokenizer, or a cache is of another teacher.
    """
    if not config.asks_teacher:
        return None
    teachers = [config.teacher, *config.teacher.others]
    loaded = [_load(teacher, config, ranks) for teacher in teachers]
    if len(loaded) == 1 and config.teacher.weight == 1.0:
        return loaded[0]
    return SeveralTeachers(tuple(loaded), tuple(teacher.weight for teacher in teachers))


def _load(teacher: TeacherConfig, config: LoopConfig, ranks: Ranks) -> OneTeacher:
    if teacher.server is not None:
        tokenizer = load_tokenizer(student_tokenizer_name(config))
        client = Client(teacher.server, teacher.client, api_key(teacher.client))
        served = connect(client, teacher.server_model, teacher.dialect, teacher.top_n, vocabulary_size(tokenizer))
        check_tokenizer(served, tokenizer)
        return served
    if teacher.cache is not None:
        return _open_cache(teacher, teacher.cache, ranks.device)
    assert teacher.model is not None
    model = _live(teacher.model, config, ranks)
    tokenizer = load_tokenizer(teacher.model)
    _check_vocabulary(f"teacher {teacher.model}", model, tokenizer)
    return LiveTeacher(model, vocabulary_size(tokenizer))


def _live(name: str, config: LoopConfig, ranks: Ranks) -> Any:
    """A teacher's model, frozen, on this process or in parts on all of them."""
    parallel = config.training.parallel

    if ranks.world_size == 1 or parallel.of_teacher == "replicate":
        return _laid_out(name, config, here().dtype, ranks.device)

    def load() -> Any:
        return _laid_out(name, config, torch.float32)

    _refuse_quantized(name, "teacher_strategy")
    mesh = make_mesh(ranks, parallel.teacher_shard_size, "teacher_shard_size")
    model = load_in_parts(load, lambda model: model.requires_grad_(False), mesh, ranks.device, products_of(config))[0]
    _refuse_uneven(config, f"teacher {name}", model)
    return model


def student_tokenizer_name(config: LoopConfig) -> str:
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
    head = head_of(load_model(name, getattr(torch, spec.dtype), device="cpu")).rows(slice(spec.vocab_size))
    bias = None if head.bias is None else head.bias.detach().to(device)
    return TeacherCache(directory, Head(head.weight.detach().to(device), bias, head.softcap))


def check_pair(config: LoopConfig, student: Any, tokenizer: Any) -> None:
    """Refuse a student that cannot read the tokenizer's ids, and a live teacher that reads other ids.

    Raises: PairError.
    """
    _check_vocabulary("student", student, tokenizer)
    for teacher in teachers_of(config):
        _check_teacher(teacher, tokenizer)
        if teacher.cache is not None:
            _check_projected(teacher.cache, config, student)


def _check_projected(directory: Path, config: LoopConfig, student: Any) -> None:
    """Refuse targets that were projected for another head, temperature or divergence than the run has."""
    spec, loss = Spec.read(directory), config.loss
    if spec.config.mode != "projected":
        return
    if loss.divergence.name != "forward_kl" or loss.temperature != spec.config.temperature:
        raise ConfigError(
            f"{directory}: projected targets are exact for forward_kl at temperature {spec.config.temperature:g}; "
            f"found {loss.divergence.name} at {loss.temperature:g}. Change the loss, or write a cache of mode hidden."
        )
    head = head_of(student)
    if is_sharded(student) or head.weight.requires_grad:
        raise ConfigError(
            f"{directory}: projected targets are for a student in one piece whose head stays as it is; set "
            "student.train_head false, or lora."
        )
    if head_hash(head.rows(slice(spec.vocab_size))) != spec.head:
        raise PairError(
            f"{directory}: its targets were projected for the head of {spec.config.student}, and the student's is "
            "another; write a cache with this student (cache.student)."
        )


def _check_teacher(teacher: TeacherConfig, tokenizer: Any) -> None:
    if teacher.cache is not None and vocabulary_size(tokenizer) != Spec.read(teacher.cache).vocab_size:
        raise PairError(
            f"{teacher.cache}: of a vocabulary of {Spec.read(teacher.cache).vocab_size} tokens, the "
            f"student's has {vocabulary_size(tokenizer)}; write a cache for the student's (cache.tokenizer)."
        )
    if teacher.is_translated:
        assert teacher.cache is not None
        spec = Spec.read(teacher.cache)
        if tokenizer_hash(tokenizer) != spec.tokenizer:
            raise PairError(
                f"{teacher.cache}: written for the tokenizer of {spec.config.tokenizer}, and the student's is another "
                "one; write a cache for the student's (cache.tokenizer)."
            )
        return
    if teacher.model is None:
        return
    other = load_tokenizer(teacher.model)
    if other.get_vocab() != tokenizer.get_vocab():
        differing = len(set(other.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
        raise PairError(
            f"teacher {teacher.model}: its tokenizer differs from the student's in {differing} entries. Write a cache "
            "for the student's (limbeck teacher cache --cache.tokenizer STUDENT) and train on it, or train on the "
            "teacher's text (no teacher)."
        )


def _check_vocabulary(role: str, model: Any, tokenizer: Any) -> None:
    rows, needed = head_of(model).weight.shape[0], vocabulary_size(tokenizer)
    if needed > rows:
        raise PairError(
            f"{role}: the tokenizer has {needed} tokens, the model only {rows}; use the tokenizer that belongs to it."
        )
