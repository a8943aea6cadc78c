"""Built-in small models: a tokenizer whose tokens are the embedded task's symbols, and Llama shapes from scratch."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.config import checked
from limbeck.errors import ConfigError

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, TURN_START, TURN_END, "<think>", "</think>", "<|unknown|>")
WORDS = ("system", "user", "assistant", "Given", "So", "Check", "start", "ok", "no")
SYMBOLS = (*"0123456789", *"abcdefghijklmnop", *"+-*/=", " ", "\n", "\n\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@checked
class ScratchConfig:
    """A Llama-type model with random weights and the built-in symbol tokenizer, for training from scratch."""

    hidden_size: int
    """Width D of the residual stream."""
    num_layers: int
    """Number of decoder layers."""
    num_heads: int
    """Number of attention heads; divides hidden_size."""
    intermediate_size: int
    """Width F of the feed-forward layer."""
    max_positions: int = 1024
    """Longest sequence in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not (self.rope_theta > 0 and 0 <= self.seed < 2**32):
            raise ConfigError(f"rope_theta {self.rope_theta} and seed {self.seed}: expected > 0 and 0 to 2^32 - 1")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be a whole, even head size"
            )


def scratch_config(config: ScratchConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The transformers config of that shape for a tokenizer, embeddings tied, vocabulary padded to a multiple of 8."""
    vocabulary = -(-len(tokenizer) // 8) * 8
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(TURN_START),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def scratch_model(config: ScratchConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> LlamaForCausalLM:
    """A randomly initialised float32 model of that shape, embeddings tied, for a tokenizer or for the built-in one."""
    llama = scratch_config(config, symbol_tokenizer() if tokenizer is None else tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama)


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    """One token a digit, label letter, operator or known word; ChatML template; think markers of one token each."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS, *SYMBOLS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words = "|".join(sorted(WORDS, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|\n+|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token="<|unknown|>",
        additional_special_tokens=[TURN_START, "<think>", "</think>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
