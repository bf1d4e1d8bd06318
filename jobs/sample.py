"""`python -m jobs.sample`: prompts to videos, from a committed checkpoint's averaged weights, to `<run>/samples/`."""

import logging
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jobs import cli
from m4v_dist import storage
from m4v_dist.batch import derive_seed
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import write_mp4
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_to_uint8
from m4v_dist.model.build import build_model
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents
from m4v_dist.trainer import checkpoint

logger = logging.getLogger(__name__)


def sample(config: RunConfig, dry_run: bool) -> str:
    """Sample one video a prompt.

    Raises:
        ConfigError: no prompts, or a size that the codec and the pyramid cannot make.
        DataError: no committed checkpoint, or one of another model.
    """
    prompts = config.sampling.prompts
    if not prompts:
        raise ConfigError("sampling.prompts is empty; name at least one prompt.")
    codec = build_codec(config.codec)
    grid = _grid(config, codec)
    if dry_run:
        return (
            f"would sample {len(prompts)} videos of {config.sampling.num_latents} latents, {grid[0]} x {grid[1]} each"
        )
    path = choose_checkpoint(config)
    # As in training: on a busy machine more threads than free cores wait for one another.
    torch.set_num_threads(config.trainer.num_threads)
    model = _load_model(config, path)
    folder = storage.join(config.run.folder, "samples")
    entries: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        started = time.monotonic()
        latents = _sample_prompt(config, model, codec, prompt, grid)
        frames = frames_to_uint8(codec.decode(codec.normalization.denormalize(latents)))
        file = f"{number:02d}.mp4"
        write_mp4(storage.join(folder, file), frames, config.sampling.fps)
        entries.append(
            {
                "prompt": prompt,
                "file": file,
                "checkpoint": path.rsplit("/", 1)[-1],
                "seconds": time.monotonic() - started,
                "seed": config.sampling.seed,
            }
        )
    storage.write_json(storage.join(folder, "samples.json"), entries)
    return f"{len(entries)} videos from {entries[0]['checkpoint']} in {folder}"


def choose_checkpoint(config: RunConfig) -> str:
    """Path of the checkpoint that the config names, or of the newest committed one.

    Raises:
        DataError: there is none, or the named one was never finished; the message lists what is there.
    """
    folder = storage.join(config.run.folder, "checkpoints")
    if config.sampling.checkpoint is not None:
        path = storage.join(folder, config.sampling.checkpoint)
        checkpoint.require_committed(path)
        return path
    newest = checkpoint.newest_committed(folder)
    if newest is None:
        there = ", ".join(storage.list_folder(folder)) or "nothing"
        raise DataError(f"{folder}: no committed checkpoint (there is {there}); train first, with jobs.train.")
    logger.info("sampling from %s", newest)
    return newest


def _grid(config: RunConfig, codec: Codec) -> tuple[int, int]:
    """Latent grid (h, w) of the videos, checked against the codec and the coarsest pyramid stage."""
    sampling = config.sampling
    multiple = codec.spatial_stride * config.model.patch_size * 2 ** (config.objective.num_pyramid_stages - 1)
    if sampling.height_px % multiple or sampling.width_px % multiple:
        raise ConfigError(
            f"sampling: {sampling.height_px} x {sampling.width_px} px; both must be multiples of {multiple} px "
            "(codec stride x patch x coarsest pyramid stage)."
        )
    return sampling.height_px // codec.spatial_stride, sampling.width_px // codec.spatial_stride


def _load_model(config: RunConfig, path: str) -> torch.nn.Module:
    """Build the model and give it the checkpoint's averaged weights."""
    model = build_model(config.model, config.kernels, seed=config.run.seed)
    weights = checkpoint.load_ema_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(
        name
        for name in shapes.keys() | weights.keys()
        if name not in weights or shapes.get(name) != weights[name].shape
    )
    if differing:
        raise DataError(
            f"{path}: {len(differing)} parameters differ in name or shape from the config's model "
            f"({', '.join(differing[:3])}); sample with the config it was trained with."
        )
    model.load_state_dict(weights)
    device = "cuda" if config.launch.use_gpu else "cpu"
    return model.eval().to(device)


def _sample_prompt(
    config: RunConfig, model: torch.nn.Module, codec: Codec, prompt: str, grid: tuple[int, int]
) -> Tensor:
    """Normalised latents c t h w of one prompt, on the CPU."""
    sampling, objective = config.sampling, config.objective
    text, null_text = build_text_encoder(config.text_encoder).encode([prompt, ""])
    generator = torch.Generator().manual_seed(derive_seed("sample", sampling.seed, prompt))
    with tqdm(desc=prompt[:48], unit="step") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        (latents,) = sample_latents(
            model,
            [text],
            null_text,
            schedule=PyramidSchedule(
                objective.num_pyramid_stages, gamma=objective.gamma, num_train_timesteps=objective.num_train_timesteps
            ),
            num_latents=sampling.num_latents,
            grid_height=grid[0],
            grid_width=grid[1],
            channels=codec.latent_channels,
            first_unit_steps=sampling.first_unit_steps,
            later_unit_steps=sampling.later_unit_steps,
            first_unit_guidance=sampling.first_unit_guidance,
            later_unit_guidance=sampling.later_unit_guidance,
            generators=[generator],
            device=next(model.parameters()).device,
            progress=show,
        )
    return latents.cpu()


if __name__ == "__main__":
    sys.exit(cli.main("sample", sample, "Sample videos from a committed checkpoint's averaged weights."))
