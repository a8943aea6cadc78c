"""One replica: a server of its own, which takes its config from standard input and ends when that ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from limbeck.config import build
from limbeck.serve.config import ServeConfig
from limbeck.serve.server import serve


def main() -> None:
    """Serve what the router asks for."""
    config = build(ServeConfig, json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_router, daemon=True).start()
    serve(config)


def _end_with_router() -> None:
    sys.stdin.buffer.read()  # nothing comes: it ends when the router does, however that ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
