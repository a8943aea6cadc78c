"""Who writes traces: a model in this process, or a server with an OpenAI-compatible chat.

Both yield records as they are done, each with the text, its thought where it came apart, and what it cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from limbeck.client import Client, ServerRefusal, map_concurrently
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SeededSampling
from limbeck.models.load import load_model, load_tokenizer, model_hash
from limbeck.runner.place import Prepared
from limbeck.stage import Place
from limbeck.traces.journal import Key
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.trace import Trace

Records = dict[Key, dict[str, Any]]
"""By prompt key and sample: `text`, `reasoning` (or None), `stopped`, `prompt_tokens`, `tokens`."""


@dataclass(frozen=True, slots=True)
class LocalWriter:
    """Samples from a model in this process or on Ray, in fixed groups of prompts.

    A group is always sampled as a whole and with a seed of its own, so that a resumed job computes the same batches as
    an uninterrupted one, and therefore the same bits.
    """

    model: str
    sampling: SeededSampling
    render: RenderConfig
    group_prompts: int
    on: Place = "local"

    @property
    def identity(self) -> str:
        """Hash of the model's files."""
        return model_hash(self.model)

    def write(self, prompts: Sequence[Trace], done: Records) -> Iterator[Records]:
        """The records of every group that is not wholly `done`."""
        groups = [prompts[start : start + self.group_prompts] for start in range(0, len(prompts), self.group_prompts)]
        samples = range(self.sampling.num_samples)
        todo = [
            (number, group)
            for number, group in enumerate(groups)
            if any((prompt.prompt_key, sample) not in done for prompt in group for sample in samples)
        ]
        prepared = Prepared(partial(_load, self.model), self.on)
        for _, records in prepared.map(partial(_sample_group, self.sampling, self.render), todo):
            yield records


def _load(name: str) -> tuple[Any, Any]:
    return load_model(name), load_tokenizer(name)


def _sample_group(
    sampling: SeededSampling, rendering: RenderConfig, loaded: tuple[Any, Any], item: tuple[int, Sequence[Trace]]
) -> Records:
    (model, tokenizer), (number, group) = loaded, item
    ids = [render_prompt(tokenizer, prompt.messages, rendering) for prompt in group]
    # Seeds of groups are far apart: the sampler adds no number to them, it hashes (seed, prompt, sample).
    completions = complete(model, ids, sampling, stop_ids(tokenizer, rendering), sampling.seed * 2**32 + number)
    return {
        (prompt.prompt_key, sample): {
            "text": tokenizer.decode(completion.text_ids, skip_special_tokens=False),
            "reasoning": None,
            "stopped": completion.stopped,
            "prompt_tokens": len(prompt_ids),
            "tokens": len(completion.token_ids),
        }
        for prompt, prompt_ids, row in zip(group, ids, completions, strict=True)
        for sample, completion in enumerate(row)
    }


@dataclass(frozen=True, slots=True)
class ServedWriter:
    """Asks `/v1/chat/completions` for one sample a request."""

    client: Client
    model: str
    sampling: SeededSampling

    @property
    def identity(self) -> str:
        """The model's name at the server, all that is known of it."""
        return self.model

    def write(self, prompts: Sequence[Trace], done: Records) -> Iterator[Records]:
        """One record at a time, for every sample that is not `done`."""
        todo = (
            (prompt, sample)
            for prompt in prompts
            for sample in range(self.sampling.num_samples)
            if (prompt.prompt_key, sample) not in done
        )
        for (prompt, sample), record in map_concurrently(self._ask, todo, self.client.config.concurrency):
            yield {(prompt.prompt_key, sample): record}

    def _ask(self, item: tuple[Trace, int]) -> dict[str, Any]:
        prompt, sample = item
        body = {
            "model": self.model,
            "messages": [dict(message) for message in prompt.messages],
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": sample_seed(self.sampling.seed, prompt.prompt_key, sample),
        }
        answer = self.client.post("/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            message = choice["message"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerRefusal(
                f"{self.client.url}: its answer holds no choices[0].message; is this a chat server?"
            ) from error
        usage = answer.get("usage") or {}
        return {
            "text": message.get("content") or "",
            # llama.cpp, SGLang and older vLLM say reasoning_content, newer vLLM says reasoning.
            "reasoning": message.get("reasoning_content") or message.get("reasoning"),
            "stopped": choice.get("finish_reason") == "stop",
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "tokens": int(usage.get("completion_tokens") or 0),
        }


Writer = LocalWriter | ServedWriter


def sample_seed(seed: int, prompt_key: str, sample: int) -> int:
    """A seed in [0, 2^31) for one request: retries and resumed jobs ask with the same one."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_key} {sample}".encode()).digest()[:4]) >> 1
