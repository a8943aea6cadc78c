"""A device that is not there: tensors that say `cuda:0`, compute on the CPU and refuse to be mixed with its tensors.

It sees of a program what a GPU would: tensors of two devices in one operation (refused as torch refuses them), moments
at which the host waits for the device (`COUNTS.waits`, by the line of limbeck that waits), launches, and bytes that are
read and written. It says nothing of speed, of streams, or of what CUDA's kernels round.

A wrapper tensor holds the data, a dispatch mode sees every operation below autograd and autocast.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.attention.varlen as torch_varlen
import torch.utils._foreach_utils as foreach
import transformers
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda", 0)
VIEWS = frozenset((
    "view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "permute", "detach", "alias",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "diagonal",
    "unfold", "lift_fresh", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "chunk", "narrow", "movedim",
    "is_same_size", "sym_size", "sym_numel", "sym_stride",
))  # fmt: skip
"""Operations that launch nothing."""
ASKING = frozenset((
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero",
    "bincount",
))  # fmt: skip
"""Operations whose result the host needs to go on."""
INDEXED = frozenset((
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
))  # fmt: skip
UNREAD = frozenset((
    "copy_", "zero_", "fill_", "normal_", "uniform_", "random_",
))  # fmt: skip
"""Operations that overwrite their first tensor without reading it."""
SPARSE = frozenset(("gather", "scatter", "scatter_", "scatter_add_", "scatter_add", "index_copy_"))
"""Operations that touch a few entries of each row."""
EMPTY = frozenset((
    "empty", "empty_like", "new_empty", "empty_strided",
))  # fmt: skip


class Mixed(RuntimeError):
    """Tensors of the host and of the device in one operation."""


class Counts:
    """What was seen since `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        """From the host."""
        self.touched: list[tuple[str, int, tuple[int, ...], int, bool]] = []
        """Operation, its number, shape and bytes of a tensor that it read or wrote, and whether it wrote."""

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {place()}"] += 1

    @property
    def total_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def total_waits(self) -> int:
        return sum(self.waits.values())

    def bytes_over(self, shape: tuple[int, int]) -> int:
        """Read and written of tensors of a shape, rows of logits say."""
        return sum(size for _, _, found, size, _ in self.touched if found == shape)


COUNTS = Counts()


def place() -> str:
    """The innermost line of limbeck on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/limbeck/" in name and "/tests/" not in name:
            return f"{name.rpartition('/limbeck/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "(elsewhere)"


class Pretend(torch.Tensor):
    """A tensor on the device; `elem` has its data."""

    elem: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Pretend:
        assert not isinstance(elem, Pretend)
        # Never an inference tensor: of such a wrapper torch could make no views.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            made = torch.Tensor._make_wrapper_subclass(
                cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
                layout=elem.layout, device=DEVICE, requires_grad=False,
            )  # fmt: skip
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        COUNTS.wait("tolist")
        return self.elem.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @property
    def data(self) -> torch.Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: Pretend) -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.elem = value.elem

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        return torch._C.TensorBase.__getitem__(self, _listed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch._C.TensorBase.__setitem__(self, _listed(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made: Any = Pretend(self.elem.detach().clone())
            if getattr(self, "_is_param", False):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]


def _listed(index: Any) -> Any:
    """torch sends lists of indices to the device."""
    if isinstance(index, tuple):
        return tuple(_listed(part) for part in index)
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


def there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: checked, counted, computed on the data, and its results on the device again."""
    name = func._schema.name.split("::")[-1]
    flat, spec = pytree.tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, Pretend)]
    # Under inference mode compositions come whole, with the device at any place.
    asked = next((x for x in flat if isinstance(x, torch.device)), kwargs.get("device"))
    if not ours and not there(asked):
        return func(*args, **kwargs)
    if _is_composite(func, name):
        with Mode():
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    leaves = name == "_to_copy" and asked is not None and not there(asked)
    _check(func, name, args, flat, ours, leaves)
    plain_args, plain_kwargs = pytree.tree_unflatten([_data(x) for x in flat], spec)
    if there(plain_kwargs.get("device")):
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    product = plain_kwargs.pop("out_dtype", None) if name in ("mm", "addmm") else None
    out = func(*plain_args, **plain_kwargs)
    out = out if product is None else out.to(product)
    if name not in VIEWS and name != "_local_scalar_dense":
        _count(func, name, args, kwargs, ours, out)
    if leaves or name == "_local_scalar_dense":
        return out
    if name == "copy_" and not isinstance(args[0], Pretend):
        return args[0]
    if name in ("t_", "transpose_", "squeeze_", "unsqueeze_"):
        return Pretend(out.detach())
    return _returned(out, ours)


def _is_composite(func: Any, name: str) -> bool:
    """Under inference mode torch does not take compositions apart by itself."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    is_made_up = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return torch.is_inference_mode_enabled() and name not in VIEWS and is_made_up


def wrapped(x: Any) -> Any:
    return Pretend(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) else x


def _returned(out: Any, ours: list[Pretend]) -> Any:
    """Results on the device; what was changed in place is the same tensor as before."""
    known = {id(x.elem): x for x in ours}
    return pytree.tree_map(lambda x: known[id(x)] if id(x) in known else wrapped(x), out)


def _data(x: Any) -> Any:
    return x.elem if isinstance(x, Pretend) else x


def _check(func: Any, name: str, args: Any, flat: list[Any], ours: list[Pretend], leaves: bool) -> None:
    """Refuse mixtures, and count what the host waits for."""
    if name in ("_to_copy", "copy_", "_copy_from"):
        source = args[1] if name == "copy_" else args[0]
        target = isinstance(args[0], Pretend) if name == "copy_" else not leaves
        if isinstance(source, Pretend) and not target and not _is_async(args):
            COUNTS.wait("copy to the host")
        elif isinstance(source, torch.Tensor) and not isinstance(source, Pretend) and target:
            COUNTS.copies[place()] += 1
        return
    hosts = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) and x.ndim]
    if name in INDEXED:
        indices = [x for x in pytree.tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            COUNTS.wait("boolean mask")
        hosts = [x for x in hosts if not any(x is index for index in indices)]
    if ours and hosts:
        raise Mixed(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu! {func} at {place()}: "
            f"{[tuple(x.shape) for x in hosts]} on the host, {[tuple(x.shape) for x in ours]} on the device"
        )
    if name == "repeat_interleave" and "Tensor" in str(func._overloadname):
        COUNTS.wait("repeat_interleave")
    if name in ASKING:
        COUNTS.wait(name)


def _is_async(args: Any) -> bool:
    """Whether `copy_` was called without waiting."""
    return len(args) > 2 and bool(args[2])


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[Pretend], out: Any) -> None:
    if name in EMPTY:
        return
    COUNTS.launches[name] += 1
    number, given_out = COUNTS.total_launches, kwargs.get("out")
    if name in SPARSE:
        return
    for x in ours:
        if (name in UNREAD and x is args[0]) or x is given_out:
            continue
        # What is expanded is read once.
        numel = 1
        for size, stride in zip(x.elem.shape, x.elem.stride(), strict=True):
            numel *= size if stride else 1
        COUNTS.touched.append((name, number, tuple(x.elem.shape), numel * x.elem.element_size(), False))
    for x in {id(x): x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}.values():
        COUNTS.touched.append((name, number, tuple(x.shape), x.numel() * x.element_size(), True))


class Mode(TorchDispatchMode):
    """Sees operations that make tensors on the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def off() -> Iterator[None]:
    """The CPU as it is."""
    with _disable_current_modes(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def kernel(launches: int, function: Callable[..., Any], *given: Any, name: str = "kernel", passes: float = 1) -> Any:
    """`function` of the data of what is given, as so many kernels that read and write all of it `passes` times."""
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    if bad := [tuple(x.shape) for x in tensors if not isinstance(x, Pretend) and x.ndim]:
        raise Mixed(f"Expected all tensors to be on the same device: {name} at {place()} has {bad} on the host")
    with off():
        out = function(*pytree.tree_map(_data, given))
    COUNTS.launches[name] += launches
    number = COUNTS.total_launches
    for x in tensors:
        COUNTS.touched.append((name, number, tuple(x.shape), int(passes * x.numel() * x.element_size()), False))
    return _returned(out, [x for x in tensors if isinstance(x, Pretend)])


class Attention(torch.autograd.Function):
    """An attention of torch as one kernel forward and three backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], query: Any, key: Any, value: Any, *rest: Any) -> Any:
        for x in (query, key, value, *(x for x in rest if isinstance(x, torch.Tensor))):
            if not isinstance(x, Pretend):
                raise Mixed(f"Expected all tensors to be on the same device: attention at {place()}")
        COUNTS.launches["attention"] += 1
        with torch.enable_grad(), off():
            inputs = [x.elem.detach().requires_grad_() for x in (query, key, value)]
            ctx.out = function(*inputs, *(_data(x) for x in rest))
        ctx.inputs, ctx.others = inputs, len(rest)
        return Pretend(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, by_out: Any) -> Any:
        COUNTS.launches["attention backward"] += 3
        with off():
            found = torch.autograd.grad(ctx.out, ctx.inputs, by_out.elem)
        return None, *(Pretend(x) for x in found), *[None] * ctx.others


MAKERS = torch.tensor, torch.as_tensor
PLAIN_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch's, in place of it."""
    given = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not any(isinstance(x, Pretend) for x in (query, key, value)):
        return PLAIN_ATTENTION(query, key, value, attn_mask=attn_mask, **given)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return Attention.apply(
        lambda q, k, v, m: PLAIN_ATTENTION(q, k, v, attn_mask=m, **given), query, key, value, attn_mask
    )


def varlen_attn(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch's for packed sequences, causal and in the types that it takes."""
    assert query.dtype == torch.bfloat16 == key.dtype == value.dtype and window_size == (-1, 0)
    assert cu_seq_q.dtype == torch.int32

    def compute(q: Any, k: Any, v: Any, starts: Any, _: Any) -> Any:
        lengths = starts.diff().tolist()
        assert sum(lengths) == len(q) == len(k) and max(lengths) == max_q
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        found = [PLAIN_ATTENTION(*part, is_causal=True, scale=scale, enable_gqa=enable_gqa) for part in parts]
        return torch.cat(found, 2)[0].transpose(0, 1)

    return Attention.apply(compute, query, key, value, cu_seq_q, cu_seq_k)


class Event:
    """A mark in the queue, which the device has passed when it is asked."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        COUNTS.wait("event")

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.seconds - self.seconds)


def install() -> None:
    """From now on there is a device."""
    # torch lists the functions that `torch.device(...)` speaks to once: `torch.tensor` itself must be among them, or
    # transformers takes a model under construction on the meta device for one on the host.
    torch.utils._device._device_constructors()
    _patch_cuda()
    _patch_tensors()
    _patch_transformers()
    torch.nn.functional.scaled_dot_product_attention = attention
    torch_varlen.varlen_attn = varlen_attn
    Mode().__enter__()


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    found = types.SimpleNamespace(name="Pretend", total_memory=2**34, major=9, minor=0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "is_initialized": False,
        "get_device_capability": (9, 0), "is_current_stream_capturing": False, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "set_device": None, "_lazy_init": None,
        "get_device_properties": found, "get_device_name": "Pretend", "empty_cache": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state, cuda.set_rng_state = lambda *_: torch.get_rng_state(), lambda *_, **__: None
    cuda.synchronize = lambda device=None: COUNTS.wait("synchronize")
    cuda.Event = Event
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment,misc]


def _patch_tensors() -> None:
    plain_to = torch._C.TensorBase.to

    def indexed(x: Any) -> Any:
        is_open = x == "cuda" if isinstance(x, str) else isinstance(x, torch.device) and x == torch.device("cuda")
        return DEVICE if is_open else x

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain_to(self, *map(indexed, args), **{name: indexed(value) for name, value in kwargs.items()})

    def made(base: Any) -> Any:
        def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
            if isinstance(data, Pretend):
                data = data if kwargs.get("dtype") is None else to(data, kwargs["dtype"])
                return data if device is None else to(data, device)
            if there(device):
                return to(base(data, *args, **kwargs), DEVICE)
            return base(data, *args, **kwargs) if device is None else base(data, *args, device=device, **kwargs)

        return make

    foreach._foreach_supported_types.append(Pretend)
    tensor: Any = torch.Tensor
    tensor.to, tensor.cuda = to, lambda self, *_, **__: to(self, DEVICE)
    torch.tensor, torch.as_tensor = made(torch.tensor), made(torch.as_tensor)


def _patch_transformers() -> None:
    """Models are made on the CPU, and moved as a whole; tied weights stay tied."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    module_to = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = module_to(self, *args, **kwargs)
        if getattr(getattr(self, "config", None), "tie_word_embeddings", False) and hasattr(self, "tie_weights"):
            self.tie_weights()
        return out

    torch.nn.Module.to = to  # type: ignore[method-assign]
    for owner, name in (
        (transformers.AutoModelForCausalLM, "from_pretrained"),
        (transformers.PreTrainedModel, "from_pretrained"),
        (transformers.AutoModelForCausalLM, "from_config"),
    ):
        setattr(owner, name, _undisturbed(getattr(owner, name)))
    save = transformers.PreTrainedModel.save_pretrained

    def saved(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The data of the device has no storage of its own to write."""
        with on_host(self):
            return save(self, *args, **kwargs)

    transformers.PreTrainedModel.save_pretrained = saved


def _undisturbed(load: Any) -> Any:
    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        ours = torch.tensor, torch.as_tensor
        torch.tensor, torch.as_tensor = MAKERS
        try:
            with _disable_current_modes():
                return load.__func__(cls, *args, **kwargs)
        finally:
            torch.tensor, torch.as_tensor = ours

    return classmethod(call)


@contextlib.contextmanager
def on_host(model: Any) -> Iterator[None]:
    """The model's tensors are those of the CPU within the block."""
    tables = [(t, n, x) for m in model.modules() for t in (m._parameters, m._buffers) for n, x in t.items()]
    moved = [(table, name, x) for table, name, x in tables if isinstance(x, Pretend)]
    host: dict[int, Any] = {}
    for table, name, x in moved:
        is_parameter = getattr(x, "_is_param", False)
        made = torch.nn.Parameter(x.elem.detach(), x.requires_grad) if is_parameter else copy.copy(x.elem)
        table[name] = host.setdefault(id(x), made)
    try:
        yield
    finally:
        for table, name, x in moved:
            table[name] = x
