"""Batch tokenisation: texts of requests that wait together go through the tokenizer in one call, beside the loop."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any

from limbeck.serve.threads import LARGE_BYTES, Threads

BATCH_CHARACTERS = 1 << 18
"""Texts of one call; what the library keeps of a text while it works is a hundred times as large."""


class BatchTokenizer:
    """While a call is under way, what arrives is collected for the next one. Lives on one event loop."""

    def __init__(self, tokenizer: Any, threads: Threads) -> None:
        self.tokenizer, self._threads = tokenizer, threads
        self._backend = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
        """Of fast tokenizers: without the settings that the other changes with every call, so that threads may share
        it."""
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.no_truncation()
        self._lock = threading.Lock()
        self._queues: dict[bool, list[tuple[Sequence[str], asyncio.Future[list[list[int]]]]]] = {True: [], False: []}
        self._task: asyncio.Task[None] | None = None

    async def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Token ids of each text; `special` puts in front what the tokenizer puts in front of a prompt."""
        if not texts:
            return []
        characters = sum(map(len, texts))
        if characters >= LARGE_BYTES:
            return await self._threads.run(characters, lambda: self._encoded(texts, special))
        future: asyncio.Future[list[list[int]]] = asyncio.get_running_loop().create_future()
        self._queues[special].append((texts, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work_off())
        return await future

    def encode_now(self, parts: Sequence[str]) -> list[int]:
        """Token ids of a text in parts, each tokenised by itself; for threads."""
        return [token for ids in self._encoded([part for part in parts if part], False) for token in ids]

    async def _work_off(self) -> None:
        while any(self._queues.values()):
            for special, queue in self._queues.items():
                taken, queue[:] = list(queue), []
                if taken:
                    await self._answer(taken, special)

    async def _answer(
        self, taken: Sequence[tuple[Sequence[str], asyncio.Future[list[list[int]]]]], special: bool
    ) -> None:
        texts = [text for texts, _ in taken for text in texts]
        try:
            ids = await self._threads.run(0, lambda: self._encoded(texts, special))
        except Exception as error:
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
            return
        start = 0
        for own, future in taken:
            if not future.done():  # its client may have gone
                future.set_result(ids[start : start + len(own)])
            start += len(own)

    def _encoded(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = []
        batch: list[str] = []
        characters = 0
        for text in texts:
            if batch and characters + len(text) > BATCH_CHARACTERS:
                found += self._batch(batch, special)
                batch, characters = [], 0
            batch.append(text)
            characters += len(text)
        return found + self._batch(batch, special)

    def _batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            return [one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=special)]
        with self._lock:  # not verbose: it warns of long texts, which are refused with an answer anyway
            return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
