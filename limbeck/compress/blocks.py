"""A model as a list of blocks, of which one at a time has weights.

The model is built without weights; a block gets its own when it is needed and loses them afterwards. Inside a block the
linear layers that share an input form a group, and the groups are met in the order in which the block computes them:
query, key and value; the attention's output; gate and up; down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from limbeck.compress.weights import WeightSource, open_weights
from limbeck.errors import ModelError
from limbeck.models.anatomy import backbone_of
from limbeck.models.experts import UnfusedExperts, unfuse
from limbeck.models.load import locate, quiet

ROLES = {
    "q_proj": "attention_in",
    "k_proj": "attention_in",
    "v_proj": "attention_in",
    "qkv_proj": "attention_in",
    "o_proj": "attention_out",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "gate_up_proj": "mlp_in",
    "down_proj": "mlp_out",
}
"""Last part of a linear layer's name -> its place in the block; layers of one parent and one place share an input."""
_NORMS = {"attention_in": ("input_layernorm",), "mlp_in": ("pre_feedforward_layernorm", "post_attention_layernorm")}


class Group(NamedTuple):
    """Linear layers of one block that share an input."""

    block: int
    role: str
    linears: dict[str, nn.Linear]
    """By name within the block."""
    norm: nn.Module | None
    """The normalisation whose output they read, where there is one that nothing else reads."""

    @property
    def name(self) -> str:
        """Such as `layers.3.mlp_in`, with the expert where there are several."""
        first = next(iter(self.linears))
        parent = first.rpartition(".")[0]
        expert = parent.partition("experts.")[2]
        return f"layers.{self.block}.{self.role}" + (f".{expert}" if expert else "")


OnGroup = Callable[[Group, Tensor], Tensor | None]
"""Called with a group and its input before the group computes; may change weights; returns another input or None."""


class Blocks:
    """The blocks of a causal language model, with what comes before and after them."""

    def __init__(self, name: str, kept: Sequence[int] | None = None) -> None:
        """Args: name of the model; `kept` leaves out all other layers, None keeps all."""
        place = locate(name)
        with quiet():
            self.config = transformers.AutoConfig.from_pretrained(
                place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
            )
            # Buffers are computed, not stored, so they are real (rotary tables, the scale of an embedding).
            with init_empty_weights(include_buffers=False):
                self.model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        self.backbone: Any = backbone_of(self.model)
        layers: Any = self.backbone.layers
        self.kept = list(range(len(layers)) if kept is None else kept)
        self.layers: list[Any] = [layers[number] for number in self.kept]
        self._names = [list(layer.state_dict()) for layer in self.layers]
        self.dtypes: dict[str, torch.dtype] = {}
        """Stored dtypes of the block that has its weights, by name within it."""
        self.is_tied = bool(getattr(self.config, "tie_word_embeddings", False))
        needed = set(self.model.state_dict()) - ({"lm_head.weight"} if self.is_tied else set())
        self.source: WeightSource = open_weights(name, needed)
        self.rest = sorted(name for name in needed if ".layers." not in name)

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, number: int) -> str:
        """Of a block's names in the state dict of what is written."""
        return f"model.layers.{number}."

    def linear_names(self) -> list[str]:
        """The linear layers in blocks, such as `layers.0.mlp.down_proj`."""
        return [
            f"layers.{number}.{name}"
            for number, layer in enumerate(self.layers)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]

    @contextmanager
    def block(self, number: int, device: torch.device) -> Iterator[Any]:
        """A block with its weights in float32, for the length of the context; experts apart from each other."""
        layer, prefix = self.layers[number], self.prefix(self.kept[number])
        tensors = {name: self.source.tensor(prefix + name) for name in self._names[number]}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        layer.to(device).requires_grad_(False)
        unfuse(layer)
        try:
            yield layer
        finally:
            self.layers[number] = layer.to("meta")

    @torch.no_grad()
    def embed(self, input_ids: Tensor, device: torch.device) -> tuple[Tensor, list[dict[str, Any]]]:
        """What enters the first block, float32 [n T D], and for every block what else it is called with.

        The latter comes from one row: positions and masks are the same for all, and broadcast.
        """
        embedding = self.backbone.embed_tokens
        embedding.load_state_dict({"weight": self.source.tensor("model.embed_tokens.weight").float()}, assign=True)
        self.backbone.embed_tokens.to(device)
        self.backbone.rotary_emb.to(device)
        norm, self.backbone.norm = self.backbone.norm, nn.Identity()
        recorders = [_Recorder() for _ in self.backbone.layers]
        layers, self.backbone.layers = self.backbone.layers, nn.ModuleList(recorders)
        try:
            self.backbone(input_ids=input_ids[:1].to(device), use_cache=False)
            calls = [dict(recorders[number].call) for number in self.kept]
            hidden = self.backbone(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        finally:
            self.backbone.layers, self.backbone.norm = layers, norm
        return hidden, calls


class _Recorder(nn.Module):
    """Stands for a block: keeps what it is called with and passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: dict[str, Any] = {}
        # Read by some models to choose the mask.
        self.attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        self.call = call
        return hidden_states


def groups_of(block: Any, number: int) -> list[Group]:
    """The groups of a block, with its linear layers; layers of unknown place form groups of their own."""
    found: dict[tuple[str, str], dict[str, nn.Linear]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            found.setdefault((parent, ROLES.get(last, last)), {})[name] = module
    groups = []
    for (parent, role), linears in found.items():
        norms = [getattr(block, name) for name in _NORMS.get(role, ()) if hasattr(block, name)]
        # Behind a router the norm is read by it and by all experts.
        groups.append(Group(number, role, linears, norms[0] if norms and "experts" not in parent else None))
    return groups


@torch.no_grad()
def run_block(
    block: Any, number: int, hidden: Tensor, call: Mapping[str, Any], on_group: OnGroup | None, valid: Tensor
) -> Tensor:
    """One pass through a block, stopping at every group before it computes.

    A group's weights may be changed at its stop: what follows in the same pass sees the changed layer, so a block is
    passed once and every group is calibrated behind the compressed groups before it.

    Args:
      block: the module, `number` its place.
      hidden: float [n T D].
      call: what else the block is called with.
      on_group: the stop; its input is [tokens I] without padding. None passes through.
      valid: bool [n T].
    Returns: float [n T D].
    """
    handles = []
    for experts in (module for module in block.modules() if isinstance(module, UnfusedExperts)):
        experts.valid = valid.flatten()
    if on_group is not None:
        for group in groups_of(block, number):
            stop = _Stop(group, on_group, valid)
            handles += [linear.register_forward_pre_hook(stop) for linear in group.linears.values()]
    try:
        output = block(hidden, **call)
    finally:
        for handle in handles:
            handle.remove()
    return output[0] if isinstance(output, tuple) else output


class _Stop:
    """The hook of all the linear layers of a group: the first of them that computes makes the call."""

    def __init__(self, group: Group, on_group: OnGroup, valid: Tensor) -> None:
        self._group, self._on_group, self._valid = group, on_group, valid
        self._is_done = False
        self._factors: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor] | None:
        inputs = arguments[0]
        if not self._is_done:
            self._is_done = True
            flat = inputs.reshape(-1, inputs.shape[-1])
            if len(flat) == self._valid.numel() and not bool(self._valid.all()):
                flat = flat[self._valid.flatten()]
            self._factors = self._on_group(self._group, flat)
        return None if self._factors is None else (inputs * self._factors,)


def fold_into_norm(norm: nn.Module, factors: Tensor) -> None:
    """Divide the gain of a normalisation by factors [D].

    Raises: ModelError when its output is not gain * x / rms(x) with gain = weight or 1 + weight.
    """
    weight: Any = norm.weight
    probe = torch.ones(1, len(weight), device=weight.device)
    gain = norm(probe)[0]
    for offset in (0.0, 1.0):
        if torch.allclose(gain, weight + offset, rtol=1e-3, atol=1e-4):
            weight.data = (weight + offset) / factors - offset
            return
    raise ModelError(f"{type(norm).__name__}: an unknown normalisation; set equalization to none.")
