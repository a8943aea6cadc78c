"""Batch tokenisation: texts of requests that wait together go through the tokenizer in one call, beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class BatchTokenizer:
    """While a call is under way, what arrives is collected for the next one. Lives on one event loop."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "tokenizer")  # one, since a fast tokenizer may not be used by two
        self._queues: dict[bool, list[tuple[Sequence[str], asyncio.Future[list[list[int]]]]]] = {True: [], False: []}
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Token ids of each text; `special` puts in front what the tokenizer puts in front of a prompt."""
        if not texts:
            return []
        future: asyncio.Future[list[list[int]]] = asyncio.get_running_loop().create_future()
        self._queues[special].append((texts, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work_off())
        return await future

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        while any(self._queues.values()):
            for special, queue in self._queues.items():
                taken, queue[:] = list(queue), []
                if not taken:
                    continue
                texts = [text for texts, _ in taken for text in texts]
                try:
                    ids = await loop.run_in_executor(self._thread, self._encoded, texts, special)
                except Exception as error:
                    for _, future in taken:
                        if not future.done():
                            future.set_exception(error)
                    continue
                start = 0
                for own, future in taken:
                    if not future.done():  # its client may have gone
                        future.set_result(ids[start : start + len(own)])
                    start += len(own)

    def _encoded(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        # Not verbose: it warns of texts longer than the model's limit, which are refused with an answer anyway.
        return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
