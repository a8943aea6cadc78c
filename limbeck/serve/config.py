"""What `limbeck serve` can be told."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from limbeck.config import checked
from limbeck.engine.generation import GenerationConfig
from limbeck.engine.scoring import ScoringConfig
from limbeck.engine.speculative import SpeculativeConfig
from limbeck.engine.weights import Precision
from limbeck.errors import ConfigError

Engine = Literal["limbeck", "llamacpp", "vllm", "sglang"]
Policy = Literal["fcfs", "lpm", "k-lpm"]


@checked
class LimitsConfig:
    """What a client may ask for, and how much may be under way."""

    body_bytes: int = 8 << 20
    """Most bytes of a request's body; more are refused with 413."""
    body_seconds: float = 30.0
    """A body that takes longer to arrive is refused with 408."""
    body_values: int = 600_000
    """Most values in a body, lists and objects counting twice; more are refused before they are read."""
    header_bytes: int = 32 << 10
    """Most bytes of a request's line and headers; more are refused with 431."""
    header_seconds: float = 10.0
    """A connection whose request line and headers take longer is closed."""
    idle_seconds: float = 30.0
    """A connection without a request is closed after so long."""
    connections: int = 1024
    """Most connections, or as many as the process may have open files for; for a new one the one that has been idle
    for longest is closed."""
    grace_seconds: float = 25.0
    """After the first SIGTERM or Ctrl-C what was accepted is finished for so long; then the server ends."""
    items: int = 1000
    """Most items of a scoring request, or documents of a ranking."""
    prompts: int = 128
    """Most texts of a completion: prompts times n."""
    new_tokens: int = 4096
    """Most tokens of a generated text."""
    log_probs: int = 1_000_000
    """Most log-probs of a reply: texts times tokens times alternatives."""
    memory_bytes: int = 2 << 30
    """For keys and values of prefixes (a draft's as well) and of running texts, compiled forms and masks, all together:
    what was used longest ago is released first, texts wait for room, and a request that alone needs more is refused.
    Weights and the pass under way come on top; each replica has its own."""
    form_bytes: int = 128 << 20
    """Most memory of one form (a schema, a regular expression) while it is compiled."""
    form_seconds: float = 2.0
    """Compiling a form may take so long, in a process apart."""
    default_tokens: int = 2048
    """Of a chat's text that leaves it open, or what the context has room for. Memory is set aside for all of them."""
    waiting: int = 256
    """Most requests that wait; the next ones are refused with 429 and Retry-After."""
    seconds: float = 300.0
    """A request that takes longer is given up: 429 while it waits, 408 once it runs. A client sets its own, smaller
    limit with the header X-Request-Timeout-Seconds."""
    pin_seconds: float = 60.0
    """How long a prefix sent ahead stays pinned, unless it is let go or asked for again."""
    pins: int = 64
    """Most prefixes pinned at the same time."""

    def __post_init__(self) -> None:
        for name in LimitsConfig.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits.{name} must be more than 0.")


@checked
class ServeConfig:
    """The server, its engine and its limits."""

    model: str
    """Directory, alias or hub id; a GGUF file or directory for --engine llamacpp."""
    engine: Engine = "limbeck"
    """limbeck serves in this process; the others are checked, and started where they are installed."""
    engine_command: str | None = None
    """Program of the other engine, say .venv-vllm/bin/vllm, or a Python that has vLLM; null looks on the PATH."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, so set an API key then."""
    port: int = 8000
    """0 takes any free one."""
    name: str | None = None
    """What clients call the model; null: the name it is loaded by."""
    api_key: str | None = None
    """Required of every request but /health where set; better given in the environment, as LIMBECK_API_KEY."""
    allow_host: tuple[str, ...] = ()
    """Names by which clients may call this server, beside localhost, the loopback addresses and `host`; * for any.
    Where it listens for other machines, any IP address will do as well."""
    allow_origin: tuple[str, ...] = ()
    """Origins whose web pages may use this server beside its own page, say https://app.example; * for any."""
    precision: Precision = "auto"
    """Of the linear layers: float32, int8, or auto: as the checkpoint is stored."""
    context_tokens: int = 32768
    """Longest prompt with its text; the model's own limit where that is less."""
    replicas: int = 1
    """Servers of the model on this machine, each with its share of the threads and memory of its own, behind one
    address; requests that begin alike go to the same one."""
    schedule: Policy = "k-lpm"
    """Who is next: fcfs, first come first served; lpm, longest prefix in the cache; k-lpm, in turns."""
    k: int = 2
    """With k-lpm, the first of every k picks is the oldest request, so that nobody starves."""
    batch_tokens: int = 2048
    """Most tokens that are scored between two steps of generation; a larger request is scored by itself."""
    labels: tuple[str, ...] | None = None
    """Label tokens of requests that name none; null: those the ranking model was trained on, else ' yes' and ' no'."""
    num_threads: int | None = None
    """Threads of the engine; null leaves torch's choice."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How prefixes are kept and passes are made."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How texts are generated."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    """A small model that proposes what the served one checks."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What a client may ask for."""

    def __post_init__(self) -> None:
        if min(self.k, self.batch_tokens, self.context_tokens, self.replicas) < 1:
            raise ConfigError("serve: k, batch_tokens, context_tokens and replicas must be 1 or more.")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("serve: the API key is empty (LIMBECK_API_KEY, --api-key); set a key, or unset it.")
        if self.replicas > 1 and self.engine != "limbeck":
            raise ConfigError(f"serve: --replicas is of this server; {self.engine} has replicas of its own.")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"serve: port {self.port}; a port is 0 to 65535.")

    @property
    def turn(self) -> int | None:
        """k of the k-LPM schedule that the policy is: 1 for FCFS, None (without end) for LPM."""
        return {"fcfs": 1, "lpm": None, "k-lpm": self.k}[self.schedule]
