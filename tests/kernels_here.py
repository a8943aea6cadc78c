"""Which kernels of decoding this machine has: compiled ones need a C++ compiler and AVX2."""

from limbeck.engine.native import build


def kernels_here() -> list[str]:
    """Values of `GenerationConfig.kernels` to test."""
    try:
        build.library()
    except build.Missing:
        return ["torch"]
    return ["compiled", "torch"]
