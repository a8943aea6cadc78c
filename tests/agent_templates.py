"""Chat templates for turns with tools in the forms of well-known families, cut down to what rendering has to stand."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LAST_USER = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)

QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}" + _LAST_USER + "{% for m in messages %}"
    "{% if m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content.lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n"
    "{% else %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts stay until the next question; the last turn has an empty one where it has none."""

HARMONY = (
    "{% if tools %}<|start|>developer<|message|>"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% set ns = namespace(name='') %}{% for m in messages %}{% set here = loop %}"
    "{% if m.role == 'assistant' %}{% set later = namespace(final=false) %}"
    "{% for after in messages[loop.index:] %}"
    "{% if after.role == 'assistant' and not after.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}"
    "{% if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}"
    "{% if m.thinking and not later.final %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif here.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""gpt-oss: channels for thought, calls and answer; a turn ends otherwise when it was just written than in the past."""

LLAMA3 = (
    "<|begin_of_text|>"
    "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""One call a turn and no text beside it; thoughts have no place."""

DEEPSEEK = (
    "{% set ns = namespace(answered=false) %}<｜begin▁of▁sentence｜>{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.answered = false %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}{% set ns.answered = true %}<｜tool▁outputs▁begin｜>"
    "<｜tool▁output▁begin｜>{{ m.content }}"
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    "{% elif m.role == 'assistant' %}{% if not ns.answered %}<｜Assistant｜>{% endif %}{% set ns.answered = false %}"
    "{{ m.content.split('</think>')[-1] }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ call.function.name }}\n```json\n{{ call.function.arguments | tojson }}\n```<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.answered %}<｜Assistant｜><think>\n{% endif %}"
)
"""R1: the header opens the thought, the past has none, and behind a tool's answer there is no header."""

GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    + _LAST_USER
    + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>"
    "{% if loop.index0 > ns.last and m.reasoning_content %}{{ '\n' }}<think>{{ m.reasoning_content.strip() }}</think>"
    "{% else %}{{ '\n' }}<think></think>{% endif %}"
    "{% if m.content.strip() %}{{ '\n' }}{{ m.content.strip() }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ call.function.name }}\n"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""No end of turn: a turn ends with the token that begins the next header; the past has empty thoughts."""


class Family(NamedTuple):
    """A template with what belongs to it."""

    template: str
    special: tuple[str, ...]
    eos: str
    markers: tuple[str, str] = ("<think>", "</think>")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Bytes and the special tokens of the family."""
        tokens = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(tokens, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=self.eos, pad_token=self.eos)
        made.chat_template = self.template
        return made


FAMILIES = {
    "qwen3": Family(QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "harmony": Family(
        HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|>",
        ("<|channel|>analysis<|message|>", "<|end|>"),
    ),
    "llama3": Family(
        LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "deepseek": Family(
        DEEPSEEK,
        (
            *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
            *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
        ),
        "<｜end▁of▁sentence｜>",
    ),
    "glm": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
}
