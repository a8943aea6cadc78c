"""A teacher behind a server: top-n log-probabilities of the prompt, asked for sequence by sequence.

Three dialects, since each server has its own way to score given tokens:

    vllm        /v1/completions with token ids and `prompt_logprobs`: one request a sequence, cut after the last
                supervised token. vLLM scores every position of what it is sent; it cannot begin later.
    sglang      /generate with `input_ids`, `logprob_start_len` and `top_logprobs_num`: supervised part only.
    llama_cpp   /completion with `n_probs`: one request a supervised position over the server's kept prefix, raw
                softmax (`post_sampling_probs` off).

One sequence a request, and few under way at once, is what keeps a server alive: the logits of a prompt are
[tokens V] floats there. A server gives no more than its own limit of entries (vLLM: --max-logprobs, 20 unless raised);
the mass of all others is the tail, as in any top-k target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.client import Client, ServerRefusal, map_concurrently
from limbeck.errors import LimbeckError, PairError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import NOTHING_GIVEN, Given
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.batch import Batch, Example

Dialect = Literal["auto", "vllm", "sglang", "llama_cpp"]
Entries = list[tuple[int, float]]
"""Token id and log-probability, most likely first."""
MOST_LOG_MASS = math.log1p(-1e-7)
"""Kept mass at most: where rounding leaves none for the tail, the tail has 1e-7, and its logarithm stays finite."""

PROBE = "If 3x + 4 = 19, what is x? It's (19-4)/3 = 5.0;\n\n  \u00fcber, \u4e2d\u6587."
"""Digits, signs, spaces and letters beyond ASCII: where tokenizers differ."""


class Query(NamedTuple):
    """Positions of one sequence: the distribution of token t given those before it, for every t of `positions`."""

    tokens: list[int]
    positions: list[int]
    """Increasing, each at least 1."""


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """Asks a server for its `top_n` most likely tokens at the supervised positions.

    Its targets are limited to the server's top n: `log_tail` holds everything else.
    """

    in_step: ClassVar[bool] = False
    """Every process asks when it likes."""

    client: Client
    model: str
    """As the server calls it; llama.cpp and SGLang serve one and ignore it."""
    dialect: str
    top_n: int
    vocab_size: int
    """The tokenizer's real vocabulary; an entry beyond it is padding of the server's model and falls to the tail."""

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> TopKTargets:
        """Top-n targets for the tokens at flat indices `rows` of the batch; float32, on the batch's device.

        Raises: LimbeckError when the server does not answer, PairError when it answers about other tokens.
        """
        with ledger.phase("teacher"):
            scored = self.score(_queries(batch, examples, rows))
            flat = [entries for query in scored for entries in query]
        return to_targets(flat, self.top_n, self.vocab_size, batch.input_ids.device)

    def score(self, queries: Sequence[Query]) -> list[list[Entries]]:
        """The entries at every position of every query, in order."""
        ask = _ASK[self.dialect]

        def one(query: Query) -> list[Entries]:
            answers = ask(self, query)
            return [[entry for entry in entries if entry[0] < self.vocab_size] for entries in answers]

        return [entries for _, entries in map_concurrently(one, queries, self.client.config.concurrency)]


def connect(client: Client, model: str | None, dialect: Dialect, top_n: int, vocab_size: int) -> ServedTeacher:
    """A served teacher, its dialect and model asked for where they are not named.

    Raises: LimbeckError when the server does not answer or its kind cannot be told.
    """
    kind = dialect if dialect != "auto" else detect(client)
    name = model or client.only_model()
    return ServedTeacher(client, name, kind, top_n, vocab_size)


def check_tokenizer(teacher: ServedTeacher, tokenizer: Any) -> None:
    """Compare the server's tokens of a short text with the student's, where the server tokenizes (vLLM, llama.cpp).

    Raises: PairError when they differ; the ids that are sent would mean other text to the server's model.
    """
    if teacher.dialect == "vllm":
        body = {"model": teacher.model, "prompt": PROBE, "add_special_tokens": False}
    elif teacher.dialect == "llama_cpp":
        body = {"content": PROBE, "add_special": False, "parse_special": True}
    else:
        return
    theirs = _at(teacher.client.post("/tokenize", body), teacher, "tokens")
    ours = tokenizer.encode(PROBE, add_special_tokens=False)
    if theirs != ours:
        raise PairError(
            f"{teacher.client.url}: its model reads {PROBE!r} as {len(theirs)} tokens, the student as {len(ours)} "
            "other ones; token distillation needs one tokenizer. Serve a teacher of the same family, cache a "
            "local one for the student's tokenizer (cache.tokenizer), or train on its text (traces generate)."
        )


def detect(client: Client) -> str:
    """The kind of a server, from what only it answers: llama.cpp has /props, SGLang /get_model_info, vLLM /version.

    Raises: LimbeckError when it is none of them.
    """
    for path, sign, kind in (
        ("/props", "default_generation_settings", "llama_cpp"),
        ("/get_model_info", "model_path", "sglang"),
        ("/version", "version", "vllm"),
    ):
        answer = client.has(path)
        if answer is not None and sign in answer:
            return kind
    raise LimbeckError(
        f"{client.url}: cannot tell what kind of server this is; name its dialect: vllm, sglang or llama_cpp."
    )


def to_targets(rows: Sequence[Entries], top_n: int, vocab_size: int, device: torch.device) -> TopKTargets:
    """Entries of N positions as tensors [N K], K <= top_n; shorter rows are padded with -inf.

    A row that holds the whole vocabulary has no tail, whatever its rounding leaves.
    """
    width = max((len(entries[:top_n]) for entries in rows), default=1)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    log_probs = np.full((len(rows), width), -np.inf)
    for row, entries in enumerate(rows):
        if not entries:
            raise PairError(
                "the server gave no entry of the vocabulary at a position; is this the student's tokenizer?"
            )
        ids[row, : len(entries[:top_n])] = [token for token, _ in entries[:top_n]]
        log_probs[row, : len(entries[:top_n])] = [value for _, value in entries[:top_n]]
    log_mass = np.minimum(np.logaddexp.reduce(log_probs, axis=1), MOST_LOG_MASS)
    log_tail = np.where(np.isfinite(log_probs).sum(axis=1) < vocab_size, np.log1p(-np.exp(log_mass)), -np.inf)
    return TopKTargets(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(log_probs).to(device, torch.float32),
        torch.from_numpy(log_tail).to(device, torch.float32),
    )


def _queries(batch: Batch, examples: Sequence[Example], rows: Tensor) -> list[Query]:
    """The rows of each example that has any, in the order of the batch; `rows` are increasing."""
    flat = rows.cpu().numpy()
    width = batch.input_ids.shape[1]
    lengths = np.array(batch.sequence_lengths)
    starts = (
        np.concatenate([[0], np.cumsum(lengths)[:-1]]) if batch.layout == "packed" else np.arange(len(lengths)) * width
    )
    queries = []
    for example, start, length in zip(examples, starts, lengths, strict=True):
        mine = flat[(flat >= start) & (flat < start + length)] - start
        if len(mine):
            queries.append(Query(example.sample.input_ids.tolist(), mine.tolist()))
    return queries


def _ask_vllm(teacher: ServedTeacher, query: Query) -> list[Entries]:
    sent = query.tokens[: query.positions[-1] + 1]
    body = {
        "model": teacher.model,
        "prompt": sent,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": teacher.top_n,
    }
    answer = teacher.client.post("/v1/completions", body)
    given = _at(answer, teacher, "choices", 0, "prompt_logprobs")
    if not isinstance(given, list) or len(given) != len(sent):
        raise PairError(
            f"{teacher.client.url}: prompt_logprobs of {len(given or [])} positions for {len(sent)} tokens; "
            "expected one each. Is this a vLLM server that takes token ids?"
        )
    return [_sorted((int(token), _value(entry)) for token, entry in given[t].items()) for t in query.positions]


def _ask_sglang(teacher: ServedTeacher, query: Query) -> list[Entries]:
    sent = query.tokens[: query.positions[-1] + 1]
    body = {
        "input_ids": sent,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": query.positions[0] - 1,
        "top_logprobs_num": teacher.top_n,
    }
    meta = _at(teacher.client.post("/generate", body), teacher, "meta_info")
    tokens, given = _at(meta, teacher, "input_token_logprobs"), _at(meta, teacher, "input_top_logprobs")
    # Counted from the end: versions differ in whether the first entry, which has no value, is there.
    needed = len(sent) - query.positions[0]
    if len(given) < needed or [entry[1] for entry in tokens[-needed:]] != sent[-needed:]:
        raise PairError(f"{teacher.client.url}: scored other tokens than it was sent; is this an SGLang server?")
    return [_sorted((entry[1], entry[0]) for entry in given[t - len(sent)]) for t in query.positions]


def _ask_llama_cpp(teacher: ServedTeacher, query: Query) -> list[Entries]:
    answers = []
    for position in query.positions:
        body = {
            "prompt": query.tokens[:position],
            "n_predict": 1,
            "n_probs": teacher.top_n,
            "temperature": 0.0,
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
        answer = teacher.client.post("/completion", body)
        given = _at(answer, teacher, "completion_probabilities", 0, "top_logprobs")
        answers.append(_sorted((entry["id"], entry["logprob"]) for entry in given))
    return answers


_ASK: dict[str, Callable[[ServedTeacher, Query], list[Entries]]] = {
    "vllm": _ask_vllm,
    "sglang": _ask_sglang,
    "llama_cpp": _ask_llama_cpp,
}


def _sorted(entries: Any) -> Entries:
    return sorted(((int(token), float(value)) for token, value in entries), key=lambda entry: (-entry[1], entry[0]))


def _value(entry: Any) -> float:
    return entry["logprob"] if isinstance(entry, dict) else entry


def _at(answer: Any, teacher: ServedTeacher, *path: str | int) -> Any:
    for step in path:
        try:
            answer = answer[step]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerRefusal(
                f"{teacher.client.url}: its answer has no {'.'.join(map(str, path))}; it does not score prompts "
                f"the way of {teacher.dialect}. Name its dialect, or use it for traces only."
            ) from error
    return answer
