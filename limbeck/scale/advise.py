"""`limbeck advise`: which format and which cut for a model, a machine and a workload, and what they save.

Times are a roofline's (roofline.py), on this machine as measured or by the table. Formats are ranked by what the
workload is paid for: the time of a request (ranking, reasoning) or requests a second (batch). Among those within 10 %
of the best, the one that needs least (no calibration before calibration, 8 bits before 4) is named. What a cut costs in
quality no roofline knows: `limbeck recover` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from limbeck.compress.shrink import shrunk_config
from limbeck.config import checked
from limbeck.cost.hardware import MEASURED, Hardware, hardware_of
from limbeck.cost.shapes import Dims, config_of, frozen_sizes
from limbeck.errors import ConfigError
from limbeck.scale.roofline import Format, Model, Requests, Times, formats_of, times_of, weight_bytes

Kind = Literal["ranking", "reasoning", "batch"]
CLOSE = 0.9
"""Share of the best speed from which the simpler format is taken."""
ORDER = ("bf16", "float32", "fp8", "w8a8", "w4a16")
"""From the format that needs least to the one that needs most."""
CUTS = (("as it is", 0.0, 1.0), ("a quarter of the neurons", 0.25, 1.0), ("half of the neurons", 0.5, 1.0),
        ("half of the neurons, 5 of 7 layers", 0.5, 5 / 7))  # fmt: skip
"""Name, share of the neurons that go, share of the layers that stay; the last is the shape of the 375M ranker that was
made of Qwen3-0.6B (28 to 20 layers)."""
DEFAULTS: dict[Kind, Requests] = {
    "ranking": Requests(prefix_tokens=500, items=50, item_tokens=150, new_tokens=0),
    "reasoning": Requests(prefix_tokens=300, items=1, item_tokens=0, new_tokens=2000),
    "batch": Requests(prefix_tokens=300, items=1, item_tokens=0, new_tokens=2000),
}
BATCH = 256
"""Sequences that offline generation decodes together where nothing else is said."""


@checked
class AdviseConfig:
    """A model, a machine and what it is asked."""

    model: str = "qwen3-8b"
    """Directory, alias or published shape."""
    hardware: str = MEASURED
    """measured: this machine; or a device of the table (h100, h200, a100, a100-40gb, l40s, mi300x, laptop-cpu)."""
    workload: Kind = "ranking"
    """ranking: candidates scored by one token, prompts only; reasoning: long answers to users; batch: the same offline,
    as many at a time as are asked for."""
    requests_per_second: float = 1.0
    """That arrive at one device (reasoning): decides how many are decoded together."""
    prefix_tokens: int | None = None
    """Tokens that a request's candidates share, or of its prompt; null: 500 (ranking), 300."""
    items: int | None = None
    """Candidates of a request (ranking); null: 50."""
    item_tokens: int | None = None
    """Tokens of a candidate (ranking); null: 150."""
    new_tokens: int | None = None
    """Tokens of an answer; null: 0 (ranking), 2000."""
    batch_size: int | None = None
    """Sequences that are decoded together; null: by requests_per_second (reasoning), 256 (batch)."""

    def __post_init__(self) -> None:
        if not 0 < self.requests_per_second < float("inf"):
            raise ConfigError(f"requests_per_second must be above 0; found {self.requests_per_second}")
        for name in ("prefix_tokens", "items", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; found {value}")
        for name in ("item_tokens", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0; found {value}")

    def requests(self) -> Requests:
        """What one request asks for."""
        given = {name: getattr(self, name) for name in Requests._fields}
        return DEFAULTS[self.workload]._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def batch(self) -> int | None:
        """Sequences that are decoded together; None: by the rate."""
        return self.batch_size or (BATCH if self.workload == "batch" else None)


class Row(NamedTuple):
    """One choice."""

    name: str
    needs: str
    weight_bytes: float
    fits: bool
    times: Times

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "needs": self.needs,
            "weight_bytes": round(self.weight_bytes),
            "fits": self.fits,
            **{f"{name}_seconds": getattr(self.times, name) for name in ("prefill", "step", "request")},
            "batch": self.times.batch,
            "requests_per_second": self.times.requests_per_second,
        }


class Advice(NamedTuple):
    """What was found."""

    formats: list[Row]
    cuts: list[Row]
    """Shapes in the chosen format."""
    chosen: str
    reasons: list[str]


def run(config: AdviseConfig) -> tuple[Advice, Hardware]:
    """The advice, and the machine it is for."""
    hardware = hardware_of(config.hardware)
    return advise(config, hardware), hardware


def advise(config: AdviseConfig, hardware: Hardware) -> Advice:
    """Formats and cuts with their times, the one to take, and why."""
    shape, requests = config_of(config.model), config.requests()
    whole = _model(shape)

    def row(name: str, needs: str, model: Model, form: Format) -> Row:
        size = weight_bytes(model, form)
        times = times_of(model, form, requests, hardware, config.requests_per_second, config.batch)
        return Row(name, needs, size, size < 0.9 * hardware.memory_bytes, times)

    known = formats_of(hardware)
    formats = [row(form.name, form.needs, whole, form) for form in known]
    chosen = _choose(formats, config.workload)
    form = next(form for form in known if form.name == chosen.name)
    cuts = []
    for name, neurons, layers in CUTS:
        cut = _model(_cut(shape, neurons, layers))
        cuts.append(row(name, "nothing" if name == CUTS[0][0] else "limbeck recover", cut, form))
    return Advice(formats, cuts, chosen.name, _reasons(config.workload, formats, cuts, chosen, hardware, requests))


def speed(row: Row, workload: Kind) -> float:
    """What a workload is ranked by, the larger the better."""
    return row.times.requests_per_second if workload == "batch" else 1.0 / row.times.request


def _choose(formats: Sequence[Row], workload: Kind) -> Row:
    """The format that needs least among those near the best; of those that fit, where any does."""
    fitting = [row for row in formats if row.fits] or list(formats)
    best = max(speed(row, workload) for row in fitting)
    close = [row for row in fitting if speed(row, workload) >= CLOSE * best]
    return min(close, key=lambda row: ORDER.index(row.name))


def _model(shape: Any) -> Model:
    return Model(frozen_sizes(shape), Dims.of(shape))


def _cut(shape: Any, neurons: float, layers: float) -> Any:
    kept = max(32, int(shape.intermediate_size * (1 - neurons)) // 32 * 32) if neurons else shape.intermediate_size
    return shrunk_config(shape, neurons=kept, layers=range(max(1, round(shape.num_hidden_layers * layers))))


def _reasons(
    workload: Kind, formats: Sequence[Row], cuts: Sequence[Row], chosen: Row, hardware: Hardware, requests: Requests
) -> list[str]:
    plain, times = formats[0], chosen.times
    what = "requests a second" if workload == "batch" else "speed of a request"
    lines = [
        f"reading {requests.prompt_tokens} tokens of prompt is bound by {_bound(times.is_prefill_bound_by_products)}"
    ]
    if requests.new_tokens:
        share = requests.new_tokens * times.step / times.request
        lines.append(
            f"generating {requests.new_tokens} tokens, {times.batch:.0f} sequences together, is bound by "
            f"{_bound(times.is_decode_bound_by_products)} and takes {share:.0%} of a request's time"
        )
    gain = speed(chosen, workload) / speed(plain, workload)
    smaller = 1 - chosen.weight_bytes / plain.weight_bytes
    lines.append(f"{chosen.name}: {gain:.2f} times the {what} of {plain.name}, weights {smaller:.0%} smaller")
    fastest = max(formats, key=lambda row: speed(row, workload))
    if fastest.name != chosen.name:
        more = speed(fastest, workload) / speed(chosen, workload) - 1
        why = "does not fit" if not fastest.fits else "needs more care"
        lines.append(f"{fastest.name} would be {more:.0%} faster, but {why}")
    if not requests.new_tokens:
        lines.append("w4a16 multiplies in the plain format, so that prompts are read no faster")
    if "fp8" not in hardware.flops:
        lines.append(f"{hardware.name} has no fp8 products")
    lines.append("single zeroed weights (2:4 or not) save nothing here: engines load them dense")
    best = speed(cuts[-1], workload) / speed(cuts[0], workload)
    lines.append(f"the deepest cut of the table: {best:.2f} times the {what} on top; recover it by distillation")
    return lines


def _bound(by_products: bool) -> str:
    return "products" if by_products else "memory traffic"
