"""Bytes of a training step at its highest moment, term by term.

Five moments are compared, and the highest is the answer:

    loss       weights + teacher + optimizer + gradients of earlier micro-batches + activations + loss + workspace
    backward   the same at its end: all gradients instead of activations
    teacher    the teacher's forward pass instead of the student's
    update     weights, gradients and optimizer state, and what the update copies
    validation weights + teacher + optimizer, and a forward pass of uncut sequences

On a CPU a state that is written beside the training adds a copy of trained weights and optimizer state to any of them.

Activations are what autograd keeps of a layer, in float32 bytes a token (D width, Q and K widths of queries and keys, F
neurons, N heads), for the three ways in which a layer is computed:

    lean (models/lean.py)       4 (2 D + 3 Q + 2 K + 2 F + N + 2)
    transformers, float32       4 (6 D + 3 Q + 2 K + 4 F + N + 2)
    transformers, bf16 autocast 26 D + 6 Q + 4 K + 8 F + 4 N + 8, and 2 bytes a weight for autocast's copies
    with recomputation          4 D a layer, and one layer as above

`tests/scale/test_scale_memory.py` counts what autograd keeps and compares. On an accelerator the sum is what its
allocator reports. On a CPU the resident set also holds what libraries load with the first step (`PROGRAM_BYTES`) and
what the allocator does not hand back (`ALLOCATOR_FRACTION` of all that comes and goes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from limbeck.cost.shapes import Dims
from limbeck.models.anatomy import Computed, Sizes

# On a CPU more rows than this make the products no faster.
CPU_CHUNK_ROWS = 256
# Size of one [rows V] temporary of the elementwise work: a thread's share of it fits its second-level cache on a
# CPU; on an accelerator it is large enough to hide the launches.
CPU_BLOCK_BYTES = 2**19
DEVICE_BLOCK_BYTES = 64 * 2**20
HEAD_ROWS = 256
"""Rows of logits that scoring holds at once."""

PROGRAM_BYTES = 36 * 2**20
"""Resident bytes of code and tables that are loaded between the ledger's baseline and the end of the first step, in a
process that has done nothing before."""
COMPILER_BYTES = 72 * 2**20
"""The same of torch's compiler, which recomputation and adapters import when they first run."""
ALLOCATOR_FRACTION = 0.25
"""Of the bytes that come and go within a step on a CPU: what the allocator holds beside them at the highest moment."""
BLOCK_TEMPORARIES = 6
"""Blocks of logits that the elementwise part of the loss holds at once."""
STATES = {"adamw": 2, "sgd": 1, "asgld": 1, "asg": 1, "agld": 1, "sgld": 0, "psgld": 1, "noisy_sgd": 0}
"""Float32 numbers that an optimizer keeps a weight."""


class Way(NamedTuple):
    """How a model's passes are computed."""

    is_lean: bool
    """By models/lean.py."""
    is_bf16: bool
    """Under autocast."""
    is_recomputed: bool
    """With gradient checkpointing."""
    has_head_norms: bool
    """Queries and keys have norms of their own (Qwen3)."""
    is_cpu: bool = True


class Pass(NamedTuple):
    """What one micro-batch sends through a model."""

    computed: Computed
    rows: int
    """Positions in the loss."""
    mask_pairs: int = 0
    """Pairs of an attention mask that is written out; 0 where sequences are passed one by one."""


def layer_bytes(dims: Dims, way: Way) -> int:
    """Bytes a token that autograd keeps of one layer."""
    d, q, k, f, n = dims.width, dims.queries, dims.keys, dims.neurons, dims.heads
    if way.is_lean:
        return 4 * (2 * d + 3 * q + 2 * k + 2 * f + n + 2)
    if way.is_bf16:
        return 26 * d + 6 * q + 4 * k + 8 * f + 4 * n + 8 + (6 * (q + k) if way.has_head_norms else 0)
    return 4 * (6 * d + 3 * q + 2 * k + 4 * f + n + 2 + (2 * (q + k) if way.has_head_norms else 0))


def saved_bytes(dims: Dims, way: Way, sent: Pass) -> int:
    """Bytes that autograd keeps of the backbone between forward and backward."""
    tokens, last = sent.computed.tokens, sent.computed.last_tokens
    if way.is_recomputed:
        return tokens * (4 * dims.width * dims.layers + layer_bytes(dims, way) + 12 * dims.width)
    kept = dims.layers * tokens * layer_bytes(dims, way)
    if not way.is_lean:
        return kept + 12 * dims.width * tokens
    behind = 4 * (dims.width + dims.queries + 2 * dims.neurons)
    masks = 4 * dims.layers * sent.mask_pairs
    return kept - behind * (tokens - last) + masks + 8 * dims.width * last


def forward_bytes(dims: Dims, way: Way, computed: Computed) -> int:
    """Most bytes alive at once in a forward pass that keeps nothing."""
    item = 2 if way.is_bf16 else 4
    widest = max(2 * dims.width + 3 * dims.neurons, 2 * dims.width + 4 * dims.queries + 2 * dims.keys)
    return computed.tokens * (4 * dims.width + item * widest)


def backward_bytes(dims: Dims, way: Way, computed: Computed) -> int:
    """Temporaries in the backward pass of one layer."""
    item = 2 if way.is_bf16 else 4
    return computed.tokens * (item * 4 * dims.neurons + 4 * 3 * dims.width)


class Loss(NamedTuple):
    """The shapes that the head and the loss work on."""

    vocab: int
    """Rows of the student's head that are used."""
    width: int
    is_head_trainable: bool
    chunk_bytes: int
    teacher_widths: tuple[int, ...] = ()
    """Widths of the dense teachers' hidden states."""
    topk: int = 0
    """Entries a row of cached or served teachers."""


def loss_bytes(loss: Loss, way: Way, rows: int, threads: int) -> int:
    """Bytes of the fused loss: gradients of head and hidden states, logits of a chunk, teachers' rows."""
    item = 2 if way.is_bf16 and not way.is_cpu else 4
    heads = 1 + bool(loss.teacher_widths)
    limit = max(1, loss.chunk_bytes // (item * loss.vocab * heads))
    chunk = min(rows, min(limit, CPU_CHUNK_ROWS) if way.is_cpu else limit)
    block = CPU_BLOCK_BYTES * threads if way.is_cpu else DEVICE_BLOCK_BYTES
    block = min(block, 4 * chunk * loss.vocab)
    head = 4 * loss.vocab * loss.width * loss.is_head_trainable
    copies = item * loss.vocab * (loss.width + sum(loss.teacher_widths)) if item == 2 else 0
    teacher_rows = rows * (4 * sum(loss.teacher_widths) + 12 * loss.topk)
    logits = heads * chunk * loss.vocab * item
    return head + copies + 4 * rows * loss.width + teacher_rows + logits + BLOCK_TEMPORARIES * block


class TrainedModel(NamedTuple):
    """A model that trains."""

    sizes: Sizes
    dims: Dims
    way: Way
    trainable_parameters: int


class LiveTeacher(NamedTuple):
    """A live teacher."""

    sizes: Sizes
    dims: Dims
    way: Way


def training_memory(
    student: TrainedModel,
    teachers: Sequence[LiveTeacher],
    loss: Loss,
    largest: Pass,
    teacher_passes: Sequence[Pass],
    *,
    optimizer: str,
    accumulates: bool,
    steps: int,
    validation: Pass | None = None,
    threads: int = 1,
    is_adapted: bool = False,
    saves: bool = False,
) -> dict[str, int]:
    """Bytes by term at the highest moment of a run on one device.

    Args:
      largest: the micro-batch with most activations.
      teacher_passes: the largest of each teacher.
      optimizer: name, as in the optimizer's config.
      accumulates: whether gradients of earlier micro-batches are there during a later one.
      steps: of the run; in the first there is no optimizer state before the update.
      validation: the largest group of held-out sequences.
      threads: of the CPU.
      is_adapted: whether adapters train.
      saves: whether states are written while training goes on.
    """
    way, dims = student.way, student.dims
    trainable = 4 * student.trainable_parameters
    states = states_of(optimizer) * trainable
    resident = {
        "weights": 4 * student.sizes.num_parameters,
        "teacher": sum(4 * teacher.sizes.num_parameters for teacher in teachers),
    }
    if saves and way.is_cpu:
        resident["saving"] = trainable + states
    later = states if steps > 1 else 0
    kept = {"optimizer": later, "gradients": trainable if accumulates else 0}
    of_loss = loss_bytes(loss, way, largest.rows, threads)
    casts = 2 * student.sizes.linear_weights if way.is_bf16 else 0
    working = backward_bytes(dims, way, largest.computed)
    head = 4 * loss.vocab * loss.width * loss.is_head_trainable
    teaching = max(map(_teaching_bytes, teachers, teacher_passes), default=0)
    embedding = 4 * dims.vocab * dims.width if student.trainable_parameters == student.sizes.num_parameters else 0
    moments: list[dict[str, int]] = [
        kept | {"activations": saved_bytes(dims, way, largest) + casts, "loss": of_loss, "workspace": working},
        {"optimizer": later, "gradients": trainable, "loss": head, "workspace": working + embedding},
        kept | {"workspace": teaching},
        {"optimizer": states, "gradients": trainable, "workspace": trainable if optimizer == "sgd" else 0},
    ]
    if validation is not None:
        tried = loss_bytes(loss._replace(is_head_trainable=False), way, validation.rows, threads)
        working = forward_bytes(dims, way, validation.computed) + casts
        moments.append({"optimizer": states, "loss": tried, "workspace": working})
    highest = resident | max(moments, key=lambda moment: sum(moment.values()))
    return with_program(highest, is_adapted or way.is_recomputed) if way.is_cpu else highest


def _teaching_bytes(teacher: LiveTeacher, sent: Pass) -> int:
    casts = 2 * teacher.sizes.linear_weights if teacher.way.is_bf16 else 0
    return forward_bytes(teacher.dims, teacher.way, sent.computed) + casts


def without_program(memory: Mapping[str, int]) -> dict[str, int]:
    """The terms in a process that has done such work before: what libraries load is there already."""
    return {name: size for name, size in memory.items() if name != "program"}


def with_program(memory: Mapping[str, int], has_compiler: bool = False) -> dict[str, int]:
    """The terms as a CPU's resident set shows them: with libraries, and with what the allocator holds back."""
    program = PROGRAM_BYTES + (COMPILER_BYTES if has_compiler else 0)
    passing = sum(memory.get(name, 0) for name in ("activations", "loss", "workspace"))
    return {**memory, "program": program, "allocator": int(ALLOCATOR_FRACTION * passing)}


def states_of(optimizer: str) -> int:
    """Numbers a weight that an optimizer keeps; a perturbed one what the inner one keeps."""
    return STATES[optimizer.removeprefix("perturb(").removesuffix(")")]
