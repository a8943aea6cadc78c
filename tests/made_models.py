"""Small random models of the supported families, in transformers' own classes."""

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def made_model(family: str, seed: int = 0, **sizes: int):
    """A random model with norms away from one and biases away from zero, so that forgetting them shows."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, kind + "Config")(**SIZES | extra | sizes)
    name = {"Gemma3Text": "Gemma3"}.get(kind, kind) + "ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model
