"""`pytest -p pretend.plugin FILE`: the tests of a file on the pretend device."""

from pretend import building

building.load()

from pretend import counted_kernels, device  # noqa: E402

from limbeck.models import probe  # noqa: E402

# What models are found to be on this device must not be taken for what they are on a real one.
probe._directory = building.answers
device.install()
counted_kernels.install()
