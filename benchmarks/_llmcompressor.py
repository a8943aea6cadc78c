"""llm-compressor on a whole model, run by the interpreter of its own venv; limbeck is not imported here.

    .venv-compress/bin/python benchmarks/_llmcompressor.py MODEL TOKENS.json METHOD OUT THREADS

TOKENS.json is a list of token id lists. OUT becomes a plain float32 checkpoint: quantised weights are written as the
values they stand for. The last line printed is a JSON object, seconds of the whole `oneshot` call by two clocks,
loading and saving apart.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

GROUP_SIZE = 64
# AWQ pins host memory for copies to an accelerator, and without one torch refuses to.
IntermediatesCache.pin_memory = lambda *_: None
LINEAR: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}


def scheme(kind: str, actorder: str | None = None) -> dict[str, Any]:
    """Arguments of a quantisation modifier: symmetric grids, nothing kept in higher precision but the head."""
    if kind == "w4a16":
        weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP_SIZE)
        activations = None
    else:
        weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
        activations = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def pruning(structure: str) -> dict[str, Any]:
    """Arguments of a pruning modifier: half of the weights, over a block of columns or 2 of every 4."""
    return {"sparsity": 0.5, "mask_structure": structure, **LINEAR}


RECIPES: dict[str, Any] = {
    "w4a16-rtn": lambda: [QuantizationModifier(**scheme("w4a16"))],
    "w4a16-gptq": lambda: [GPTQModifier(**scheme("w4a16"))],
    "w4a16-awq": lambda: [AWQModifier(), QuantizationModifier(**scheme("w4a16"))],
    "w8a8-rtn": lambda: [QuantizationModifier(**scheme("w8a8"))],
    "w8a8-gptq": lambda: [GPTQModifier(**scheme("w8a8"))],
    "w8a8-smoothquant+gptq": lambda: [SmoothQuantModifier(), GPTQModifier(**scheme("w8a8"))],
    "sparse50-wanda": lambda: [WandaPruningModifier(**pruning("0:0"))],
    "sparse50-sparsegpt": lambda: [SparseGPTModifier(**pruning("0:0"))],
    "2:4-wanda": lambda: [WandaPruningModifier(**pruning("2:4"))],
    "2:4-sparsegpt": lambda: [SparseGPTModifier(**pruning("2:4"))],
}


def plain_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights as they act, without the parameters of quantisation."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or name == "lm_head":
            continue
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is not None:
            # With the order of columns kept apart, groups are those of consecutive columns again.
            groups = getattr(module, "weight_g_idx", None)
            weight = fake_quantize(weight, module.weight_scale, module.weight_zero_point, arguments, groups)
        found[f"{name}.weight"] = weight.detach().clone()
    return found


def main(source: str, tokens: str, method: str, out: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    sequences = json.loads(Path(tokens).read_text(encoding="utf-8"))
    rows = {"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    starts = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=RECIPES[method](),
        num_calibration_samples=len(sequences),
        max_seq_length=max(map(len, sequences)),
        shuffle_calibration_samples=False,
        batch_size=1,
    )
    seconds = {"wall": time.perf_counter() - starts[0], "cpu": time.process_time() - starts[1]}
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    missing, unexpected = plain.load_state_dict(plain_weights(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    plain.save_pretrained(out)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
