"""Runs the application until a signal, and then until what was accepted is answered."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn

from limbeck.errors import ConfigError
from limbeck.progress import console
from limbeck.runner.threads import threads
from limbeck.serve.app import make_app
from limbeck.serve.config import ServeConfig
from limbeck.serve.gate import Gate
from limbeck.serve.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """uvicorn, but on the first signal it goes on answering: 503 to what is new, results to what it has taken."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once."""
        if self._gate.is_closing:
            self.force_exit = True
            self.should_exit = True
        self._gate.is_closing = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._gate.is_closing and not self._gate.under_way:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(config: ServeConfig) -> None:
    """Load the model and answer requests until SIGTERM or SIGINT."""
    listener = bind(config)
    with threads(config.num_threads):
        _serve(config, Service(config), listener)


def _serve(config: ServeConfig, service: Service, listener: socket.socket) -> None:
    gate = Gate(make_app(service), config.limits, config.api_key)
    server = Server(
        uvicorn.Config(gate, log_level="warning", access_log=False, timeout_keep_alive=30, lifespan="on"), gate
    )
    host, port = listener.getsockname()[:2]
    if config.host not in LOOPBACK and config.api_key is None:
        console.print(f"{config.host}: other machines can ask this server, and no API key is set.")
    steps = service.generator.steps
    if not steps.are_compiled:
        reason = f"; {steps.missing}" if steps.missing else ""
        console.print(f"decoding by torch's operators{reason}.", markup=False, highlight=False)
    console.print(f"serving {service.name} at http://{host}:{port}", markup=False, highlight=False)
    server.run(sockets=[listener])
    console.print("all requests are answered; the server has ended.")


def bind(config: ServeConfig) -> socket.socket:
    """An address of our own before any time goes into loading a model; nobody is let in yet.

    Raises: ConfigError when it is taken.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"serve: cannot listen on {config.host}:{config.port} ({error.strerror}).") from error
    return bound
