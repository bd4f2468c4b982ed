"""What an export may carry over of a student that was quantised."""

import dataclasses

import pytest
import torch

from distill.compress.ptq import ptq
from distill.export.grid import Grid, grids_of
from distill.types import DataError
from tests.export.sources import llama, mixed

pytest.importorskip("torchao", reason="integers are torchao's")


@pytest.mark.parametrize("scheme", ["int8", "int4", "int2", "ternary"])
def test_integers_times_scales_are_the_weights(scheme: str) -> None:
    model = ptq(llama(), scheme)
    found = grids_of(model)
    assert len(found) == 14
    for name, grid in found.items():
        weight = model.get_submodule(name).weight
        out, width = grid.levels.shape
        blocks = grid.levels.view(out, grid.scales.shape[1], -1) * grid.scales[..., None]
        assert torch.equal(blocks.view(out, width), weight)  # type: ignore[arg-type]
        fine = grid.blocks(16)
        assert fine is not None
        assert torch.equal((grid.levels.view(out, -1, 16) * fine[..., None]).view(out, width), weight)  # type: ignore[arg-type]
        assert (grid.rows() is None) == (grid.scales.shape[1] > 1)


def test_blocks_across_scales_are_none() -> None:
    how = next(iter(mixed().grids.values())).how
    levels = torch.ones(4, 64, dtype=torch.int8)
    assert Grid(levels, torch.ones(4, 4), how).blocks(32) is None, "a scale is of 16"
    assert Grid(levels, torch.ones(4, 1), how).blocks(24) is None, "24 does not divide 64"


def test_only_what_fits_is_learned() -> None:
    given = mixed()
    assert {grid.how.bits for grid in given.learned(8).values()} == {4, 8}
    assert all("mlp" in name for name in given.learned(4))
    assert dataclasses.replace(given, grids={}).learned(8) == {}


def test_weights_that_were_trained_on_are_refused() -> None:
    model = ptq(llama(), "int4")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1 + 1e-3 * torch.rand(32))  # type: ignore[operator, union-attr]
    with pytest.raises(DataError, match="not on a grid"):
        grids_of(model)
