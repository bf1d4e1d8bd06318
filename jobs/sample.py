"""`python -m jobs.sample`: prompts to videos, from a committed checkpoint's averaged weights, to `<run>/samples/`.

With `sampling.first_frame` every video begins with that picture, as the codec gives it back (image to video).
"""

import logging
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.latent_cache import LatentCache
from jobs import cli
from m4v_dist import storage
from m4v_dist.batch import TextFeatures, derive_seed
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import TextEncoder, build_text_encoder, text_encoder_fingerprint
from m4v_dist.frozen.video_file import MediaError, centre_crop, decode_image, resize_cover, write_mp4
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_from_uint8, frames_to_uint8
from m4v_dist.model.build import build_model
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.resume import changes

logger = logging.getLogger(__name__)

TRAINED_SECTIONS = ("codec.", "text_encoder.", "model.")
TRAINED_KEYS = ("objective.gamma", "objective.num_pyramid_stages", "objective.num_train_timesteps")
"""Settings that the weights were trained for: sampled with others, a model gives noise and no error."""


def sample(config: RunConfig, dry_run: bool) -> str:
    """Sample one video a prompt.

    Raises:
        ConfigError: no prompts, or one longer than the text encoder reads; no first frame or GPU where one is asked
            for; or settings that the checkpoint was not trained with.
        DataError: no committed checkpoint, or a damaged one; a first frame that is no picture.
    """
    prompts = config.sampling.prompts
    if not prompts:
        raise ConfigError("sampling.prompts is empty; name at least one prompt.")
    codec = build_codec(config.codec)
    # That both sides divide down to the coarsest pyramid stage is the config's own check.
    stride = codec.spatial_stride
    grid = (config.sampling.height_px // stride, config.sampling.width_px // stride)
    device = choose_device(config)
    path = choose_checkpoint(config)
    require_trained_settings(config, codec, path)
    first_frame = read_first_frame(config)
    if dry_run:
        beginning = "" if first_frame is None else f", each beginning with {config.sampling.first_frame}"
        return (
            f"would sample {len(prompts)} videos of {config.sampling.num_latents} latents, {grid[0]} x {grid[1]} each, "
            f"from {path}{beginning}"
        )
    # As in training: on a busy machine more threads than free cores wait for one another.
    torch.set_num_threads(config.trainer.num_threads)
    text_encoder = build_text_encoder(config.text_encoder, str(device))
    _require_short_prompts(config, text_encoder)
    model = _load_model(config, path).to(device)
    *texts, null_text = text_encoder.encode([*prompts, ""])
    first_latents = None if first_frame is None else codec.normalization.normalize(codec.encode(first_frame))
    folder = storage.join(config.run.folder, "samples")
    _remove_earlier(folder)
    entries: list[dict[str, Any]] = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        started = time.monotonic()
        latents = _sample_prompt(config, model, codec, prompt, (text, null_text), first_latents)
        frames = frames_to_uint8(codec.decode(codec.normalization.denormalize(latents).to(device)))
        file = f"{number:02d}.mp4"
        write_mp4(storage.join(folder, file), frames, config.sampling.fps)
        entries.append(
            {
                "prompt": prompt,
                "file": file,
                "checkpoint": path.rsplit("/", 1)[-1],
                "seconds": time.monotonic() - started,
                "seed": config.sampling.seed,
                "first_frame": config.sampling.first_frame,
            }
        )
    storage.write_json(storage.join(folder, "samples.json"), entries)
    return f"{len(entries)} videos from {entries[0]['checkpoint']} in {folder}"


def _require_short_prompts(config: RunConfig, text_encoder: TextEncoder) -> None:
    """Refuse prompts that the encoder would cut: their videos would be of another text than samples.json says.

    Raises:
        ConfigError: with each prompt that is too long, its tokens and the limit.
    """
    limit = config.text_encoder.max_tokens
    counts = [(prompt, text_encoder.count_tokens(prompt)) for prompt in config.sampling.prompts]
    too_long = [f"{prompt!r} has {count}" for prompt, count in counts if count > limit]
    if too_long:
        raise ConfigError(
            f"sampling.prompts: at most {limit} tokens (text_encoder.max_tokens, markers counted) are read, but "
            f"{'; '.join(too_long)}. Shorten them; the limit is the one that the model was trained with."
        )


def read_first_frame(config: RunConfig) -> Tensor | None:
    """The picture that the videos begin with, 1 h w c, float32 in [-1, 1], scaled and cropped to the sampled size.

    Returns:
        None where `sampling.first_frame` names none.

    Raises:
        ConfigError: no such file.
        DataError: it is no picture.
    """
    path, size = config.sampling.first_frame, (config.sampling.height_px, config.sampling.width_px)
    if path is None:
        return None
    try:
        picture = decode_image(storage.read_bytes(path))
    except OSError as error:
        raise ConfigError(
            f"sampling.first_frame={path}: cannot be read ({error.strerror or error}); name a picture, or leave it out "
            "to sample from the prompt alone."
        ) from error
    except MediaError as error:
        raise DataError(f"sampling.first_frame={path}: {error}; give a picture, such as a JPEG or PNG.") from error
    return frames_from_uint8(torch.from_numpy(centre_crop(resize_cover(picture, *size), *size).copy()))


def _remove_earlier(folder: str) -> None:
    """Remove the videos of an earlier call, which would be taken for this one's; other files stay."""
    listed = storage.join(folder, "samples.json")
    if storage.exists(listed):
        entries = storage.read_json(listed)
        logger.info("removing the %d videos of an earlier call from %s", len(entries), folder)
        for entry in entries:
            storage.remove(storage.join(folder, entry["file"]))
        storage.remove(listed)


def choose_checkpoint(config: RunConfig) -> str:
    """Path of the checkpoint that the config names, or of the newest committed one.

    Raises:
        DataError: there is none, or the named one was never finished; the message lists what is there.
    """
    folder = storage.join(config.run.folder, "checkpoints")
    if config.sampling.checkpoint is not None:
        named = config.sampling.checkpoint
        # A name in this run's folder, or a path of any run's.
        path = named.rstrip("/") if "/" in named else storage.join(folder, named)
        checkpoint.require_committed(path)
        return path
    newest = checkpoint.newest_committed(folder)
    if newest is None:
        there = ", ".join(storage.list_folder(folder)) or "nothing"
        raise DataError(f"{folder}: no committed checkpoint (there is {there}); train first, with jobs.train.")
    logger.info("sampling from %s", newest)
    return newest


def choose_device(config: RunConfig) -> torch.device:
    """A GPU where the run uses them, else the CPU.

    Raises:
        ConfigError: launch.use_gpu without a GPU here.
    """
    if not config.launch.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "launch.use_gpu=true, but torch sees no GPU here, and sampling runs in this process; add "
            "launch.use_gpu=false to sample on the CPU."
        )
    return torch.device("cuda")


def require_trained_settings(config: RunConfig, codec: Codec, path: str) -> None:
    """Compare what the weights were trained for with the checkpoint's own config.

    Weight files of codec and text encoder may have moved: then the cache's fingerprint says whether they are the same.

    Raises:
        ConfigError: with each field and both values.
        DataError: the checkpoint is damaged; or a weight file has moved, and the cache is missing or was made with
            another.
    """
    checkpoint.check(path)
    before = checkpoint.read_config(path)
    now = config.model_dump(mode="json")
    differing = [
        change
        for change in changes(before, now, stage_index=len(config.curriculum))
        if change.key.startswith(TRAINED_SECTIONS) or change.key in TRAINED_KEYS
    ]
    moved = [change for change in differing if change.key in ("codec.weights", "text_encoder.weights")]
    refused = [
        str(change) for change in differing if change not in moved and not change.key.startswith("model.recompute")
    ]
    if refused:
        raise ConfigError(
            f"{path} was trained with other settings: {'; '.join(refused)} (checkpoint -> config). Sample with the "
            "config that it was trained with."
        )
    if moved:
        fingerprint = codec.fingerprint() | text_encoder_fingerprint(config.text_encoder)
        LatentCache.open(config.precompute.cache, fingerprint)


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
            f"({', '.join(differing[:3])}), though the settings are the checkpoint's; it was written by other code."
        )
    model.load_state_dict(weights)
    return model.eval()


def _sample_prompt(
    config: RunConfig,
    model: torch.nn.Module,
    codec: Codec,
    prompt: str,
    text: tuple[TextFeatures, TextFeatures],
    first_latents: Tensor | None,
) -> Tensor:
    """Normalised latents c t h w of one prompt, on the CPU; `text` is the prompt's and the null prompt's."""
    sampling, objective = config.sampling, config.objective
    generator = torch.Generator().manual_seed(derive_seed("sample", sampling.seed, prompt))
    with tqdm(desc=prompt[:48], unit="step") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        (latents,) = sample_latents(
            model,
            [text[0]],
            text[1],
            schedule=PyramidSchedule(
                objective.num_pyramid_stages, gamma=objective.gamma, num_train_timesteps=objective.num_train_timesteps
            ),
            num_latents=sampling.num_latents,
            grid_height=sampling.height_px // codec.spatial_stride,
            grid_width=sampling.width_px // codec.spatial_stride,
            channels=codec.latent_channels,
            first_unit_steps=sampling.first_unit_steps,
            later_unit_steps=sampling.later_unit_steps,
            first_unit_guidance=sampling.first_unit_guidance,
            later_unit_guidance=sampling.later_unit_guidance,
            has_linear_guidance=sampling.has_linear_guidance,
            generators=[generator],
            device=next(model.parameters()).device,
            first_latents=None if first_latents is None else [first_latents],
            progress=show,
        )
    return latents.cpu()


if __name__ == "__main__":
    sys.exit(
        cli.main(
            "sample",
            sample,
            "Sample videos from a committed checkpoint's averaged weights.",
            preflight=cli.require_run_folder,
        )
    )
