"""Shared by all tests: one CPU thread, no network, and the helper modules beside this file."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Bits and tolerances are those of a CPU, on a machine with a GPU too.
os.environ.setdefault("LIMBECK_DEVICE", "cpu")

# Triton decides on it when it is imported, which torch does: without a GPU its kernels are interpreted.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import torch

torch.set_num_threads(1)

# A loaded machine is no failure: deadlines and the check for slow inputs measure it, not the code.
hypothesis.settings.register_profile(
    "limbeck", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=True
)
hypothesis.settings.load_profile("limbeck")
