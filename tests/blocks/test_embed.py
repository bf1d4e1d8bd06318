"""Patches and the timestep sinusoid."""

import pytest
import torch

from m4v_dist.blocks.embed import patchify, timestep_sinusoid, unpatchify


def test_unpatchify_undoes_patchify() -> None:
    clip = torch.randn(3, 2, 4, 6)
    tokens = patchify(clip, 2)
    assert tokens.shape == (2 * 2 * 3, 12)
    assert torch.equal(unpatchify(tokens, 2, 2, 3, 2), clip)


def test_a_patch_lists_its_rows_then_columns_with_channels_innermost() -> None:
    clip = torch.arange(2 * 4.0).view(2, 1, 2, 2)
    assert patchify(clip, 2).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_a_grid_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 6 is no multiple of model.patch_size=2"):
        patchify(torch.randn(3, 1, 5, 6), 2)


def test_sinusoid_has_cosines_first_and_runs_from_one_to_the_longest_period() -> None:
    out = timestep_sinusoid(torch.tensor([0.0, 1.0]))
    assert out.shape == (2, 256)
    assert torch.all(out[0, :128] == 1) and torch.all(out[0, 128:] == 0)
    torch.testing.assert_close(out[1, [0, 128]], torch.tensor([1.0]).cos().item() * torch.tensor([1.0, 0.0])
                               + torch.tensor([1.0]).sin().item() * torch.tensor([0.0, 1.0]))  # fmt: skip
    torch.testing.assert_close(out[1, 255], torch.tensor(10_000.0 ** -(127 / 128)), rtol=1e-4, atol=0)
