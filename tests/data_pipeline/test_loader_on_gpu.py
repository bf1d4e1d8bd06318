"""Page-locked batches: what a loader hands out on a machine with a GPU goes over without a wait, and is the same."""

from pathlib import Path

import pytest
import torch

from m4v_dist.batch import to_device
from tests.data_pipeline.made_cache import make_cache
from tests.data_pipeline.test_loader import SOURCES, enter_video_stage, make_loader, take


def test_float32_on_a_device_is_what_one_conversion_gives() -> None:
    stored = torch.randn(3, 5).bfloat16()
    assert torch.equal(to_device(stored, "cpu"), stored.float()) and to_device(stored, "cpu").dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_batches_are_page_locked_and_the_same(tmp_path: Path, prefetch_steps: int) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    plain = take(enter_video_stage(make_loader(folder, prefetch_steps=0)), 4)
    pinned = take(enter_video_stage(make_loader(folder, prefetch_steps=prefetch_steps, pin_memory=True)), 4)
    for expected, found in zip(plain, pinned, strict=True):
        for left, right in zip(expected.micro_batches, found.micro_batches, strict=True):
            assert left.slots == right.slots and right.null_text.tokens.is_pinned()
            for number, latents in enumerate(right.latents):
                text = right.text[number]
                assert latents.is_pinned() and text.tokens.is_pinned() and text.pooled.is_pinned()
                assert torch.equal(latents, left.latents[number])
                on_gpu = to_device(latents, "cuda")
                torch.cuda.synchronize()
                assert torch.equal(on_gpu.cpu(), left.latents[number].float())
                assert torch.equal(text.to("cuda").tokens.cpu(), left.text[number].tokens.float())
