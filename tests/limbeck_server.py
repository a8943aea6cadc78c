"""A real server for tests: the built-in student behind uvicorn, in a thread of this process."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from limbeck.config import build
from limbeck.serve.app import make_app
from limbeck.serve.config import ServeConfig
from limbeck.serve.gate import Gate
from limbeck.serve.server import Server, bind
from limbeck.serve.service import Service


class RunningServer:
    """Use it as a context manager; `url` is its address."""

    def __init__(self, model: str = "tiny-student", protocol: Any = AutoHTTPProtocol, **fields: Any) -> None:
        self.config = build(ServeConfig, {"model": model, "port": 0, **fields})
        self.service = Service(self.config)
        self.gate = Gate(make_app(self.service), self.config)
        self._server = Server(self.gate, self.config.limits, lambda: self.service.dispatcher.give_up(), protocol)
        self._socket = bind(self.config)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the server did not end"

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """One request, as a client without any library would send it."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)
