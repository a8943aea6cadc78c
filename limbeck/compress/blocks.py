"""A model as a list of blocks, of which one at a time has weights.

The model is built without weights; a block gets its own when it is needed and loses them afterwards. Inside a block the
linear layers that share an input form a group, and the groups are met in the order in which the block computes them:
query, key and value; the attention's output; gate and up; down.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from limbeck.compress.weights import WeightSource, dtype_of, open_weights
from limbeck.errors import ModelError
from limbeck.models.anatomy import backbone_of
from limbeck.models.experts import unfuse
from limbeck.models.load import locate, quiet
from limbeck.progress import console

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


_EXPERT = re.compile(r"experts\.\d+\.")


class Group(NamedTuple):
    """Linear layers of one block that share an input."""

    block: int
    role: str
    linears: dict[str, nn.Linear]
    """By name within the block."""

    @property
    def name(self) -> str:
        """Such as `layers.3.mlp_in`, with the expert where there are several."""
        first = next(iter(self.linears))
        parent = first.rpartition(".")[0]
        expert = parent.partition("experts.")[2]
        return f"layers.{self.block}.{self.role}" + (f".{expert}" if expert else "")

    def without(self, ignore: Sequence[str]) -> Group | None:
        """The group without the layers whose name contains one of `ignore`; None when nothing is left."""
        kept = {
            name: linear
            for name, linear in self.linears.items()
            if not any(part in f"layers.{self.block}.{name}" for part in ignore)
        }
        return self._replace(linears=kept) if kept else None


class Blocks:
    """The blocks of a causal language model, with what comes before and after them."""

    def __init__(self, name: str, kept: Sequence[int] | None = None) -> None:
        """Args: name of the model; `kept` leaves out all other layers, None keeps all.

        Raises: ModelError for a model of another build, or whose weights and config are of different models.
        """
        self.config, self.model = _skeleton(name)
        self.backbone: Any = backbone_of(self.model)
        _check_build(name, self.backbone)
        layers: Any = self.backbone.layers
        self.kept = list(range(len(layers)) if kept is None else kept)
        self.layers: list[Any] = [layers[number] for number in self.kept]
        self.dtypes: dict[str, torch.dtype] = {}
        """Stored dtypes of the block that has its weights, by name within it."""
        is_tied = bool(getattr(self.config, "tie_word_embeddings", False))
        needed = set(self.model.state_dict()) - ({"lm_head.weight"} if is_tied else set())
        self.source: WeightSource = open_weights(name, self.model, needed)
        if is_tied and _has_own_head(self.source):
            console.print(
                f"{name}: its head differs from the embedding that config.json ties it to; it is kept, and the config "
                "that is written ties nothing.",
                highlight=False,
            )
            self.config.tie_word_embeddings = False
            needed.add("lm_head.weight")
        self.config.dtype = dtype_of(name)
        self.rest = sorted(name for name in needed if ".layers." not in name)

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, number: int) -> str:
        """Of a block's names in the state dict of what is written."""
        return f"model.layers.{number}."

    def stored(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors under the names of the checkpoint."""
        named = {self.prefix(number) + name: tensor.cpu() for name, tensor in tensors.items()}
        return self.source.as_stored(self.model, named)

    def stored_names(self, layers: Iterable[str]) -> list[str]:
        """The checkpoint's names of the weights of layers such as `layers.0.mlp.down_proj`; experts all together."""
        state, wanted = self.model.state_dict(), {}
        for layer in layers:
            name = f"model.{layer}.weight"
            name = name if name in state else _EXPERT.sub("experts.", f"model.{layer}")
            wanted[name] = state[name]
        return sorted(self.source.as_stored(self.model, wanted))

    def matrices(self) -> list[str]:
        """The modules in blocks that hold a matrix or several, such as `layers.0.mlp.down_proj`, routers included."""
        return [
            f"layers.{number}.{name.removesuffix('.weight')}"
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.state_dict().items()
            if tensor.ndim > 1
        ]

    def linear_names(self) -> list[str]:
        """The linear layers in blocks, such as `layers.0.mlp.down_proj`."""
        return [
            f"layers.{number}.{name}"
            for number, layer in enumerate(self.layers)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def shapes(self) -> Iterator[tuple[int, Any]]:
        """Every block without weights, experts apart from each other."""
        for number, layer in enumerate(self.layers):
            block = copy.deepcopy(layer)
            unfuse(block)
            yield number, block

    @contextmanager
    def block(self, number: int, device: torch.device) -> Iterator[Any]:
        """A block with its weights in float32, for the length of the context; experts apart from each other.

        Raises: ModelError for a weight that is not finite.
        """
        layer, prefix = copy.deepcopy(self.layers[number]), self.prefix(self.kept[number])
        tensors = {name: self.source.tensor(prefix + name) for name in layer.state_dict()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{prefix}{name}: the weight holds NaN or infinity; the checkpoint is damaged.")
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        layer.to(device).requires_grad_(False)
        unfuse(layer)
        yield layer

    @torch.no_grad()
    def embed(self, input_ids: Tensor, device: torch.device) -> tuple[Tensor, list[dict[str, Any]]]:
        """What enters the first block, float32 [n T D], and for every block what else it is called with.

        The latter comes from one row: positions and masks are the same for all, and broadcast.
        """
        outer = {name.removeprefix("model."): self.source.tensor(name).float() for name in self.rest}
        layers = self.backbone.layers
        recorders = [_Recorder(layer) for layer in layers]
        self.backbone.layers = nn.ModuleList(recorders)
        try:
            self.backbone.load_state_dict(outer, strict=False, assign=True)
            self.backbone.to(device)
            self.backbone(input_ids=input_ids[:1].to(device), use_cache=False)
            calls = [dict(recorders[number].call) for number in self.kept]
            self.backbone(input_ids=input_ids.to(device), use_cache=False)
        finally:
            self.backbone.layers = layers
        assert recorders[0].entered is not None
        return recorders[0].entered, calls


class _Recorder(nn.Module):
    """Stands for a block: keeps what it is called with and passes its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.call: dict[str, Any] = {}
        self.entered: Tensor | None = None
        # Not a submodule: what some models ask of a layer, such as its kind of attention, is asked of the real one.
        self._real = (layer,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"][0], name)

    def forward(self, hidden_states: Tensor, *others: Any, **call: Any) -> Tensor:
        if others:
            raise ModelError(f"{type(self._real[0]).__name__} is called with more than its input by place.")
        self.entered, self.call = hidden_states, call
        return hidden_states


def _skeleton(name: str) -> tuple[Any, Any]:
    """Config and model without weights.

    Raises: ModelError for a config that transformers makes no causal language model of.
    """
    place = locate(name)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
            )
            _refuse_other_parts(name, config)
            # Buffers are computed, not stored, so they are real (rotary tables, the scale of an embedding).
            with init_empty_weights(include_buffers=False):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds; each becomes one line with its cause kept
        raise ModelError(f"{name}: cannot build the model ({' '.join(str(error).split())[:300]}).") from error
    return config, model


def _refuse_other_parts(name: str, config: Any) -> None:
    mapping = transformers.AutoModelForCausalLM._model_mapping
    is_whole = type(config) not in mapping or mapping[type(config)].config_class is type(config)
    if config.get_text_config() is not config and is_whole:
        raise ModelError(
            f"{name}: has parts that see or hear, which are not compressed; where transformers has a model for the "
            "text alone, limbeck export --format dense writes that."
        )


def _check_build(name: str, backbone: Any) -> None:
    if not hasattr(backbone, "embed_tokens") or not isinstance(getattr(backbone, "layers", None), nn.ModuleList):
        raise ModelError(
            f"{name}: {type(backbone).__name__} has no embed_tokens and layers; compression walks over models of that "
            "build (Llama, Mistral, Qwen, Gemma, Phi ...)."
        )


def _has_own_head(source: WeightSource) -> bool:
    """Whether a head is stored that is not the embedding; equal ones are one."""
    if "lm_head.weight" not in source.names():
        return False
    return not torch.equal(source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight"))


def groups_of(block: Any, number: int) -> list[Group]:
    """The groups of a block, with its linear layers; layers of unknown place form groups of their own."""
    found: dict[tuple[str, str], dict[str, nn.Linear]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            found.setdefault((parent, ROLES.get(last, last)), {})[name] = module
    return [Group(number, role, linears) for (_, role), linears in found.items()]
