"""The server as an application of Ray Serve: replicas of a model on any number of machines, behind one address.

    serve run limbeck.serve.ray_app:app model=smollm2-135m replicas=4

Every request passes the `Gate` and goes to the replica that has its beginning in the cache, which Ray's own
`PrefixCacheAffinityRouter` chooses; within a replica it is answered as by a server of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from limbeck.config import build, to_dict
from limbeck.flags import apply_fields
from limbeck.serve.app import make_app
from limbeck.serve.config import ServeConfig
from limbeck.serve.gate import Denial, Gate, Message, Receive, Send, refuse, replayed
from limbeck.serve.routing import SLACK, beginning_of
from limbeck.serve.service import Service

ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
"""By its place: the public name is the same class behind imports that need vLLM."""
ROUTING = {"imbalanced_threshold": SLACK, "do_eviction": True}
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
"""Of ASGI, what travels."""


@dataclasses.dataclass
class Asked:
    """A request on its way to a replica."""

    prompt: str
    """What Ray's router reads; never empty."""
    scope: dict[str, Any]
    body: bytes


class Replica:
    """A deployment: one server's model and engine."""

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]
        """`tree`: the config."""
        service = Service(build(ServeConfig, tree))
        service.start()
        self._app, self._service = make_app(service), service

    async def __call__(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """The answer, message by message."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def answer() -> None:
            try:
                await self._app(asked.scope, replayed(asked.body), messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()  # its client has gone

    def check_health(self) -> None:
        """Asked by Ray, which starts another one where this raises."""
        if self._service.worker.problem is not None:
            raise RuntimeError(self._service.worker.problem)


class Front:
    """A deployment: the edge of the network, before the replicas."""

    def __init__(self, tree: dict[str, Any], replicas: Any) -> None:
        """`replicas`: their handle."""
        self._config = build(ServeConfig, tree)
        self._replicas = replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> Gate:
        return Gate(self._hand_on, self._config)

    async def _hand_on(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics" or scope["method"] == "DELETE":
            await refuse(send, Denial(501, "Behind Ray Serve a request cannot say which replica it is for."))
            return
        body = (await receive()).get("body", b"")
        prompt = await asyncio.to_thread(beginning_of, body, self._config.limits.body_values)
        asked = Asked(prompt or scope["path"], {name: scope[name] for name in SCOPE if name in scope}, body)
        answer, has_begun = self._replicas.remote(asked), False
        try:
            async for message in answer:
                has_begun = True
                await send(message)
        except (RayError, RayServeException):
            if has_begun:
                raise  # the connection is cut, as its answer was
            await refuse(send, Denial(503, "The replica ended, or all are full; ask again."))
        finally:
            answer.cancel()


def application(config: ServeConfig) -> serve.Application:
    """What `ray.serve.run` takes. Each replica has `num_threads` cores (1) and `limits.memory_bytes` of its own."""
    tree = to_dict(config) | {"name": config.name or config.model, "replicas": 1}
    under_way = config.limits.waiting + config.generation.max_running
    replicas = serve.deployment(
        name="replica",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_threads or 1},
        max_ongoing_requests=under_way,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs=ROUTING),
    )(Replica)
    front = serve.deployment(
        name="front",
        ray_actor_options={"num_cpus": 0},  # it hands on what others compute
        max_ongoing_requests=config.limits.connections,
    )(serve.ingress()(Front))
    return front.bind(tree, replicas.bind(tree))


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """`application` for `serve run` and Serve's YAML: fields of `limbeck serve` by name, say `limits.seconds=60`."""
    given = [(name.replace("-", "_"), value, name) for name, value in arguments.items()]
    tree = apply_fields(ServeConfig, {}, [one for one in given if not isinstance(one[1], str)])
    texts = [one for one in given if isinstance(one[1], str)]
    return application(build(ServeConfig, apply_fields(ServeConfig, tree, texts, is_text=True)))
