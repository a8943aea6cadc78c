"""Small tokenizers and chat templates with the habits of the real ones that rendering has to stand."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "<|im_end|>"
SPECIAL = ("<|begin|>", "<|im_start|>", EOS, "<|other_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
"""Like DeepSeek's: whatever an assistant (or a user) wrote before an end marker is lost."""
PREFILLS = STRIPS_THOUGHTS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
PREFILLS_WITHOUT_NEWLINE = PREFILLS.replace("<think>\n", "<think>")
INJECTS_EMPTY = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
CLOSES = CHATML.replace("assistant\n{% endif %}", "assistant\n</think>{% endif %}")
SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
LAST_TURN_THINKS = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > last.user %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen3's: earlier turns lose their thoughts, the last one gets an empty block when it has none."""
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PLAIN_END = WITHOUT_END.replace("{{ m.content }}\n\n", "{{ m.content }} [stop>\n")
OTHER_END = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}\n<|other_end|>")
NO_HEADER = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_BOS = "<|begin|>" + CHATML


def byte_tokenizer(
    template: str = CHATML, merges: Sequence[str] = (), adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes and the tokens that `merges` makes of them ("left right"), without splitting the text first.

    Letters of `merges` are those of byte-level BPE: Ġ for a space, Ċ for a newline. The pad token is the EOS token.
    """
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
    return _fast(tokenizer, template)


def metaspace_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Characters, with the space that sentencepiece puts in front of every text."""
    characters = [chr(i) for i in range(33, 127)] + ["\n", "▁", "▁<"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "<")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return _fast(tokenizer, template)


def _fast(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, bos_token="<|begin|>")
    fast.chat_template = template
    return fast
