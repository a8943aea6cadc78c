"""Fields of the APIs that this server speaks which it does not do: a request that sets one is refused by its name.

Passing such a field over would give another answer than was asked for. A value that changes nothing is no reason.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from limbeck.serve.errors import Invalid

OFF: tuple[Any, ...] = (False, 0, "", [], {})

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI
    "frequency_penalty": (OFF, ""),
    "presence_penalty": (OFF, ""),
    "logit_bias": (OFF, ""),
    "suffix": (OFF, ""),
    "best_of": ((1,), "use n"),
    "functions": (OFF, "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "modalities": ((["text"],), "texts alone are written"),
    "audio": ((), "texts alone are written"),
    "prediction": ((), ""),
    "web_search_options": ((), ""),
    "verbosity": (("medium",), ""),
    # vLLM
    "repetition_penalty": ((1,), ""),
    "length_penalty": ((1,), ""),
    "use_beam_search": (OFF, ""),
    "guided_json": ((), "use structured_outputs.json"),
    "guided_regex": ((), "use structured_outputs.regex"),
    "guided_choice": ((), "use structured_outputs.choice"),
    "guided_grammar": ((), ""),
    "guided_whitespace_pattern": ((), ""),
    "structural_tag": ((), ""),
    "bad_words": (OFF, ""),
    "bad_words_ids": (OFF, ""),
    "allowed_token_ids": ((), ""),
    "logits_processors": (OFF, ""),
    "truncate_prompt_tokens": ((), "send a shorter prompt"),
    "cache_salt": (("",), "prefixes are shared by all requests"),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "prompt_embeds": ((), ""),
    "skip_special_tokens": ((True, 1), ""),
    "spaces_between_special_tokens": ((True, 1), ""),
    "include_stop_str_in_output": (OFF, ""),
    "return_token_ids": (OFF, ""),
    "return_tokens_as_token_ids": (OFF, ""),
    "documents": (OFF, ""),
    "chat_template": ((), "the model's own is used"),
    "mm_processor_kwargs": (OFF, ""),
    "priority": (OFF, ""),
    "kv_transfer_params": (OFF, ""),
    "vllm_xargs": (OFF, ""),
    "include_reasoning": ((True, 1), "use separate_reasoning"),
    "activation": ((True, 1), ""),
    "use_activation": ((True, 1), ""),
    "normalize": ((), ""),
    "instruction": (("",), "write it into the query"),
    # SGLang
    "regex": ((), "use structured_outputs.regex"),
    "ebnf": ((), ""),
    "json_schema": ((), "use response_format"),
    "lora_path": ((), ""),
    "custom_logit_processor": ((), ""),
    "no_stop_trim": (OFF, ""),
    "stop_regex": (OFF, "use stop"),
    "return_hidden_states": (OFF, ""),
    "continuous_usage": (OFF, ""),
    # llama.cpp
    "grammar": (("",), "use structured_outputs"),
    "n_predict": ((), "use max_tokens"),
    "num_predict": ((), "use max_tokens"),
    "repeat_penalty": ((1,), ""),
    "typical_p": ((1,), ""),
    "tfs_z": ((1,), ""),
    "top_n_sigma": ((-1,), ""),
    "mirostat": (OFF, ""),
    "dry_multiplier": (OFF, ""),
    "xtc_probability": (OFF, ""),
    "dynatemp_range": (OFF, ""),
    "samplers": ((), ""),
    "n_probs": (OFF, "use logprobs"),
    "lora": (OFF, ""),
    # others
    "enable_thinking": ((), "use chat_template_kwargs"),
    "thinking": ((), "use chat_template_kwargs or thinking_token_budget"),
    "reasoning": ((), "use chat_template_kwargs or thinking_token_budget"),
    "rank_fields": ((), "write the fields into the text"),
    "max_chunks_per_doc": ((), "use max_tokens_per_doc"),
}
"""By name: values that change nothing, and what to do instead."""


def refuse_known(body: BaseModel) -> None:
    """Raises: Invalid for a field that would change the answer and is not done."""
    extra = body.model_extra or {}
    for name in extra.keys() & UNSUPPORTED.keys():
        neutral, instead = UNSUPPORTED[name]
        if not any(extra[name] == one for one in neutral):
            raise Invalid(f"{name}: not supported; {instead or 'leave it out'}.", name)
