"""Tiny random models of many families of transformers, in its own classes: what `docs/models.md` is made over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 24,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 28, "patch_size": 14}


@dataclass(frozen=True)
class Family:
    """One architecture."""

    kind: str
    """What stands out about it."""
    config: str
    """Name of the config's class without Config."""
    more: dict[str, Any]
    model: str = ""
    """Name of the model's class; the config's with ForCausalLM when empty."""
    text: str = ""
    """Of a model with other parts than text: the text config's class without Config; `more` is then that config's."""
    others: dict[str, Any] = field(default_factory=dict)
    """The other parts."""


FAMILIES: dict[str, Family] = {
    "Llama": Family("dense", "Llama", {}),
    "Qwen2": Family("dense", "Qwen2", {}),
    "Qwen3": Family("dense", "Qwen3", {"head_dim": 16}),
    "SmolLM3": Family("dense, layers without rope", "SmolLM3", {"no_rope_layers": [1, 0]}),
    "Phi-3": Family("dense", "Phi3", {}),
    "Phi-3 longrope": Family(
        "rope by length", "Phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24}
    ),
    "Gemma": Family("dense", "Gemma", {"head_dim": 8}),
    "Granite": Family("scaled logits", "Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "Cohere": Family("scaled logits", "Cohere", {"logit_scale": 0.25}),
    "OLMo-2": Family("dense", "Olmo2", {}),
    "GLM-4": Family("dense, partial rope", "Glm4", {"head_dim": 8}),
    "EXAONE 4": Family("windowed", "Exaone4", {"sliding_window": 12, "sliding_window_pattern": 2}),
    "Seed-OSS": Family("dense", "SeedOss", {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "Ministral 3": Family("dense", "Ministral3", {"head_dim": 8}),
    "StableLM": Family("dense, lengths are not passed on", "StableLm", {}),
    "Nemotron": Family("dense, lengths are not passed on", "Nemotron", {}),
    "Starcoder2": Family("windowed", "Starcoder2", {"sliding_window": 12}),
    "GPT-NeoX": Family("dense, other names", "GPTNeoX", {}),
    "GPT-2": Family(
        "learned positions",
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "GPT2LMHeadModel",
    ),
    "Falcon": Family("dense, other names", "Falcon", {"alibi": False, "new_decoder_architecture": False}),
    "BLOOM": Family("ALiBi", "Bloom", {"n_layer": 2, "n_head": 4}),
    "OPT": Family("learned positions", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "Mistral": Family("windowed", "Mistral", {"sliding_window": 12}),
    "Gemma 2": Family(
        "soft-capped, windowed",
        "Gemma2",
        {"head_dim": 8, "sliding_window": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    "Gemma 3": Family("windowed, two ropes", "Gemma3Text", WINDOWED | {"head_dim": 8}, "Gemma3ForCausalLM"),
    "OLMo-3": Family("windowed", "Olmo3", WINDOWED),
    "gpt-oss": Family(
        "sinks, experts, windowed",
        "GptOss",
        WINDOWED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nanochat": Family("soft-capped", "NanoChat", {"final_logit_softcapping": 4.0}),
    "Cohere 2": Family("windowed, scaled logits", "Cohere2", WINDOWED | {"logit_scale": 0.25}),
    "Llama 4": Family(
        "chunked, experts",
        "Llama4Text",
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 16,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
        },
        "Llama4ForCausalLM",
    ),
    "Mixtral": Family("experts", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Family("experts", "Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "Qwen3-MoE": Family("experts", "Qwen3Moe", EXPERTS | {"head_dim": 8}),
    "OLMoE": Family("experts", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Phi-3.5-MoE": Family(
        "experts", "Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    ),
    "GraniteMoE": Family("experts", "GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4.5": Family("experts", "Glm4Moe", ROUTED | {"head_dim": 8, "first_k_dense_replace": 1}),
    "MiniMax-M2": Family("experts", "MiniMaxM2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "DeepSeek-V3": Family("latent attention, experts", "DeepseekV3", LATENT | ROUTED | {"first_k_dense_replace": 1}),
    "DeepSeek-V2": Family("latent attention, experts", "DeepseekV2", LATENT | ROUTED | {"first_k_dense_replace": 1}),
    "MiniCPM 3": Family("latent attention", "MiniCPM3", LATENT),
    "Qwen3-Next": Family(
        "hybrid: delta rule, experts", "Qwen3Next", DELTA | EXPERTS | {"shared_expert_intermediate_size": 64}
    ),
    "Qwen3.5": Family("hybrid: delta rule", "Qwen3_5Text", DELTA, "Qwen3_5ForCausalLM"),
    "LFM2": Family("hybrid: convolutions", "Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "Granite 4": Family(
        "hybrid: Mamba-2",
        "GraniteMoeHybrid",
        MAMBA2
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "logits_scaling": 3.0,
            "position_embedding_type": "rope",
        },
    ),
    "Bamba": Family("hybrid: Mamba-2", "Bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "Falcon-H1": Family("hybrid: Mamba-2", "FalconH1", MAMBA2 | {"mamba_d_ssm": 64, "head_dim": 8}),
    "Jamba": Family(
        "hybrid: Mamba, experts",
        "Jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "Zamba 2": Family(
        "hybrid: Mamba-2, shared block",
        "Zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "chunk_size": 16,
        },
    ),
    "RecurrentGemma": Family(
        "hybrid: recurrent",
        "RecurrentGemma",
        {
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "attention_window_size": 16,
            "head_dim": 8,
            "logits_soft_cap": 4.0,
        },
    ),
    "MiniMax": Family(
        "hybrid: linear attention",
        "MiniMax",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "block_size": 16,
        },
    ),
    "Mamba": Family("state space only", "Mamba", {"state_size": 8, "num_hidden_layers": 2}),
    "Gemma 3, vision": Family(
        "text part of a vision model",
        "Gemma3",
        WINDOWED | {"head_dim": 8},
        "Gemma3ForConditionalGeneration",
        "Gemma3Text",
        {
            "vision_config": VISION | IMAGES,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "LLaVA": Family(
        "text part of a vision model",
        "Llava",
        {},
        "LlavaForConditionalGeneration",
        "Llama",
        {"vision_config": VISION | IMAGES | {"model_type": "siglip_vision_model"}, "image_token_index": 5},
    ),
    "Qwen2.5-VL": Family(
        "text part of a vision model",
        "Qwen2_5_VL",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLText",
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "fullatt_block_indexes": [0],
            }
        },
    ),
    "Qwen3-VL": Family(
        "text part of a vision model",
        "Qwen3VL",
        {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLText",
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
}


def build(name: str, vocab_size: int, seed: int = 0, **tokens: Any) -> Any:
    """A float32 model with weights that matter: sharp attention, norms away from one, sinks and biases from zero.

    Args:
      tokens: ids of special tokens for the config, such as eos_token_id.
    """
    family = FAMILIES[name]
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2} | tokens
    settings = SIZES | family.more | tokens | {"vocab_size": vocab_size}
    if family.text:
        text = getattr(transformers, family.text + "Config")(**settings)
        config = getattr(transformers, family.config + "Config")(text_config=text, **family.others)
    else:
        config = getattr(transformers, family.config + "Config")(**settings)
    model = getattr(transformers, family.model or family.config + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model
