"""Runs the application until a signal, and then until what was accepted is answered, or its time is over."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from limbeck.errors import ConfigError
from limbeck.progress import console
from limbeck.runner.threads import threads
from limbeck.serve.admission import LOOPBACK
from limbeck.serve.app import make_app
from limbeck.serve.config import LimitsConfig, ServeConfig
from limbeck.serve.connections import Connections, protocol_over
from limbeck.serve.gate import Gate
from limbeck.serve.logs import bounded_logs
from limbeck.serve.replicas import Router
from limbeck.serve.service import Service

LAST_SECONDS = 1.0
"""For clients whose request was given up at the end of the grace, to read so."""


class Server(uvicorn.Server):
    """uvicorn, but on the first signal it goes on answering: 503 to what is new, results to what it has taken."""

    def __init__(
        self, gate: Gate, limits: LimitsConfig, give_up: Callable[[], None], protocol: Any = AutoHTTPProtocol
    ) -> None:
        """Set up.

        Args:
          give_up: called when the grace after a signal is nearly over, to refuse what is not finished.
          protocol: uvicorn's, see `protocol_over`.
        """
        connections = Connections(limits)
        super().__init__(
            uvicorn.Config(
                gate,
                http=protocol_over(connections, protocol),
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=max(1, round(limits.idle_seconds)),
                backlog=connections.backlog,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_graceful_shutdown=1,
                lifespan="on",
            )
        )
        self._gate, self._limits, self._give_up = gate, limits, give_up
        self._closes_at: float | None = None
        self._gave_up_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once."""
        if self._gate.is_closing:
            self.force_exit = self.should_exit = True
        self.close()

    def close(self) -> None:
        """Take nothing new, finish what is under way, end."""
        if not self._gate.is_closing:
            self._gate.is_closing = True
            self._closes_at = time.monotonic() + self._limits.grace_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._closes_at is not None:
            self._wind_up(time.monotonic(), self._closes_at)
        return await super().on_tick(counter)

    def _wind_up(self, now: float, closes_at: float) -> None:
        if closes_at - now < LAST_SECONDS:
            self._give_up()
            self._gave_up_at = self._gave_up_at or now
        # Also where the loop was held up until now, clients get to read why.
        is_over = now > closes_at and self._gave_up_at is not None and now - self._gave_up_at > LAST_SECONDS / 2
        if is_over:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        if is_over or not self._gate.under_way:
            self.should_exit = True


def serve(config: ServeConfig) -> None:
    """Load the model, or have replicas load it, and answer requests until SIGTERM or SIGINT."""
    listener = bind(config)
    host, port = listener.getsockname()[:2]
    with bounded_logs(), threads(config.num_threads):
        if config.host not in LOOPBACK and config.api_key is None:
            console.print(f"{config.host}: other machines can ask this server, and no API key is set.")
        told, server = _routed(config) if config.replicas > 1 else _own(config)
        console.print(f"serving {told} at http://{host}:{port}", markup=False, highlight=False)
        each = " each" if config.replicas > 1 else ""
        gib = config.limits.memory_bytes / 2**30
        console.print(
            f"up to {gib:.3g} GiB{each} for prefixes, texts and forms (limits.memory_bytes).", highlight=False
        )
        server.run(sockets=[listener])
        if not server.started:
            raise ConfigError("serve: a replica did not start; its lines above tell why.")
        console.print("the server has ended.")


def _own(config: ServeConfig) -> tuple[str, Server]:
    """A server with the model in this process."""
    service = Service(config)
    steps = service.generator.steps
    if not steps.are_compiled:
        reason = f"; {steps.missing}" if steps.missing else ""
        console.print(f"decoding by torch's operators{reason}.", markup=False, highlight=False)
    gate = Gate(make_app(service), config)
    return service.name, Server(gate, config.limits, lambda: service.dispatcher.give_up())


def _routed(config: ServeConfig) -> tuple[str, Server]:
    """A router before replicas; what is left at the end of the grace is cut."""
    name = f"{config.replicas} replicas of {config.name or config.model}"
    return name, Server(Gate(Router(config), config), config.limits, lambda: None)


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
