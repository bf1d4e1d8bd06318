"""`python -m jobs.sample`: prompts to videos, to `<run>/samples/`.

From a committed checkpoint's averaged weights or, with `sampling.weights=start`, from the start weights. With
`sampling.first_frame` every video begins with that picture, as the codec gives it back (image to video).
"""

import logging
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jobs import cli
from jobs.sampled_weights import choose_weights, load_model, require_start_weights
from m4v_dist import storage
from m4v_dist.batch import TextFeatures, derive_seed
from m4v_dist.config.explain import shown
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import build_text_encoder, token_counter
from m4v_dist.frozen.video_file import MediaError, centre_crop, decode_image, resize_cover, write_mp4
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_from_uint8, frames_to_uint8
from m4v_dist.model.build import require_text_widths
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents

logger = logging.getLogger(__name__)


def sample(config: RunConfig, dry_run: bool, folder: str | None = None) -> str:
    """Sample one video a prompt.

    Args:
        config: of the run.
        dry_run: check alone.
        folder: where the videos go; None is `<run>/samples`.

    Raises:
        ConfigError: no prompts, or a text longer than the encoder reads; no first frame or GPU where one is asked
            for; or settings that the weights were not made for.
        DataError: no committed checkpoint, or a damaged one, or damaged start weights; a first frame that is no
            picture.
    """
    prompts = config.sampling.prompts
    if not prompts:
        raise ConfigError("sampling.prompts is empty; name at least one prompt.")
    codec = build_codec(config.codec)
    # That both sides divide down to the coarsest pyramid stage is the config's own check.
    stride = codec.spatial_stride
    grid = (config.sampling.height_px // stride, config.sampling.width_px // stride)
    device = choose_device(config)
    path = choose_weights(config, codec)
    first_frame = read_first_frame(config)
    _require_short_prompts(config)
    twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if twice:
        logger.warning(
            "sampling.prompts: %s more than once: their videos will be equal, since the noise is drawn from "
            "sampling.seed and the prompt",
            ", ".join(map(shown, twice)),
        )
    if dry_run:
        beginning = "" if first_frame is None else f", each beginning with {config.sampling.first_frame}"
        return (
            f"would sample {len(prompts)} videos of {config.sampling.num_latents} latents, {grid[0]} x {grid[1]} each, "
            f"from {'the start weights ' if config.sampling.weights == 'start' else ''}{path}{beginning}"
        )
    # As in training: on a busy machine more threads than free cores wait for one another.
    torch.set_num_threads(config.trainer.num_threads)
    text_encoder = build_text_encoder(config.text_encoder, str(device))
    full_prompts = [prompt + config.sampling.prompt_suffix for prompt in prompts]
    *texts, null_text = text_encoder.encode([*full_prompts, config.sampling.negative_prompt])
    require_text_widths(config.model, null_text, f"the text of encoder {text_encoder.name}")
    model = load_model(config, path).to(device)
    first_latents = None if first_frame is None else codec.normalization.normalize(codec.encode(first_frame))
    folder = folder or storage.join(config.run.folder, "samples")
    _remove_earlier(folder)
    settings = _settings_entry(config, path)
    entries: list[dict[str, Any]] = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        started = time.monotonic()
        latents = _sample_prompt(config, model, codec, prompt, (text, null_text), first_latents)
        frames = frames_to_uint8(codec.decode(codec.normalization.denormalize(latents).to(device)))
        file = f"{number:02d}.mp4"
        write_mp4(storage.join(folder, file), frames, config.sampling.fps)
        entries.append({"prompt": prompt, "file": file, "seconds": time.monotonic() - started, **settings})
    storage.write_json(storage.join(folder, "samples.json"), entries)
    return f"{len(entries)} videos from {settings['checkpoint'] or f'the start weights {path}'} in {folder}"


def _settings_entry(config: RunConfig, path: str) -> dict[str, Any]:
    """What samples.json says of every video alike; of checkpoint and start weights, one is None."""
    sampling, is_start = config.sampling, config.sampling.weights == "start"
    return {
        "prompt_suffix": sampling.prompt_suffix,
        "negative_prompt": sampling.negative_prompt,
        "weights": sampling.weights,
        "checkpoint": None if is_start else path.rsplit("/", 1)[-1],
        "start_weights": path if is_start else None,
        "seed": sampling.seed,
        "first_frame": sampling.first_frame,
    }


def require_something_to_sample(config: RunConfig) -> None:
    """Refuse a run without weights before `result.json` makes its folder; the verb's `preflight`.

    Raises:
        ConfigError, DataError: see `require_start_weights`.
        DataError: there is nothing at `run.folder`.
    """
    if config.sampling.weights == "start":
        require_start_weights(config)
    else:
        cli.require_run_folder(config)


def _require_short_prompts(config: RunConfig) -> None:
    """Refuse prompts that the encoder would cut: their videos would be of another text than samples.json says.

    Raises:
        ConfigError: with each prompt that is too long, its tokens and the limit; or the tokenizer is not there.
    """
    count_tokens = token_counter(config.text_encoder)
    limit, sampling = config.text_encoder.max_tokens, config.sampling
    setting = "sampling.prompts with sampling.prompt_suffix" if sampling.prompt_suffix else "sampling.prompts"
    texts = [(setting, prompt + sampling.prompt_suffix) for prompt in sampling.prompts]
    texts.append(("sampling.negative_prompt", sampling.negative_prompt))
    counts = [(setting, text, count_tokens(text)) for setting, text in texts]
    too_long = [f"{setting}: {shown(text)} has {count}" for setting, text, count in counts if count > limit]
    if too_long:
        raise ConfigError(
            f"sampling: at most {limit} tokens (text_encoder.max_tokens, markers counted) are read, but "
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
            f"sampling.first_frame={storage.shown(path)}: cannot be read ({error.strerror or error}); name a picture, "
            "or leave it out to sample from the prompt alone."
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


def _sample_prompt(
    config: RunConfig,
    model: torch.nn.Module,
    codec: Codec,
    prompt: str,
    text: tuple[TextFeatures, TextFeatures],
    first_latents: Tensor | None,
) -> Tensor:
    """Normalised latents c t h w of one prompt, on the CPU.

    Args:
        prompt: as the user wrote it, without the suffix: it seeds the noise, so that a suffix alone is compared.
        text: of the prompt with its suffix, and of the negative prompt.
    """
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
            "Sample videos from a committed checkpoint's averaged weights, or from the start weights.",
            preflight=require_something_to_sample,
        )
    )
