"""Threads beside the loop: results, errors, what is cancelled, and a process that ends although one is at work."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from limbeck.serve.threads import LARGE_BYTES, Pool, Threads


def test_results_and_errors_come_back():
    async def main():
        threads = Threads()
        assert await threads.run(1, lambda: 7) == 7
        assert await threads.run(LARGE_BYTES, threading.current_thread) != threading.current_thread()
        with pytest.raises(ZeroDivisionError):
            await threads.run(1, lambda: 1 / 0)
        threads.close()

    asyncio.run(main())


def test_what_is_cancelled_before_its_turn_is_not_called():
    async def main():
        pool, called, over = Pool(1, "one"), [], threading.Event()
        first = asyncio.create_task(pool.run(over.wait))
        second = asyncio.create_task(pool.run(lambda: called.append(2)))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.wait([second])
        over.set()
        assert await first
        await pool.run(lambda: called.append(3))
        assert called == [3]

    asyncio.run(main())


def test_large_work_does_not_hold_up_small():
    async def main():
        threads, over = Threads(), threading.Event()
        large = asyncio.create_task(threads.run(LARGE_BYTES, over.wait))
        assert await threads.run(1, lambda: "small") == "small"
        over.set()
        assert await large

    asyncio.run(main())


def test_a_process_ends_although_a_thread_is_at_work():
    code = """
import asyncio, time
from limbeck.serve.threads import Threads
async def main():
    threads = Threads()
    asyncio.create_task(threads.run(1, lambda: time.sleep(60)))
    await asyncio.sleep(0.1)
    threads.close()
asyncio.run(main())
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 45
