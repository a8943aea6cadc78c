"""What a stage costs, from shapes alone: FLOPs, memory, seconds; every stage predicts by it.

Example:
    from limbeck.cost import Dims, config_of, frozen_sizes, hardware_of

    shape = config_of("qwen3-8b")  # no weights, no download
    Dims.of(shape), frozen_sizes(shape), hardware_of("h100").memory_bytes
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "DEVICES": "hardware",
        "Dims": "shapes",
        "Hardware": "hardware",
        "Prediction": "prediction",
        "config_of": "shapes",
        "frozen_sizes": "shapes",
        "hardware_of": "hardware",
        "measure_hardware": "hardware:measure",
        "on_meta": "shapes",
        "predict_sampling": "sampling",
        "total": "prediction",
        "training_memory": "memory",
    },
)
