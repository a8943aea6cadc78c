"""The sidecar of pruned checkpoints."""

import pytest
import torch

from limbeck.compress.masks import MASK_FILE, read_masks, write_masks
from limbeck.errors import CheckpointError


def test_masks_come_back_at_a_bit_a_weight(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"layer{i}.weight": torch.rand(shape, generator=generator) < 0.5
        for i, shape in enumerate([(64, 128), (3, 5), (1, 1), (0, 8), (2, 3, 7)])
    }
    path = write_masks(tmp_path, masks)
    assert path.name == MASK_FILE and path.stat().st_size < 64 * 128 / 8 + 1000
    read = read_masks(tmp_path)
    assert list(read) == list(masks)
    for name, mask in masks.items():
        assert read[name].dtype == torch.bool and torch.equal(read[name], mask)


def test_no_file_is_no_mask_and_a_foreign_one_is_refused(tmp_path):
    assert read_masks(tmp_path) == {}
    (tmp_path / MASK_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a mask file"):
        read_masks(tmp_path)
