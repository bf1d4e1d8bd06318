"""The embedded codec: a causal block transform of PyramidFlow's geometry, fitted by PCA. It is no VAE.

The first frame is cut into 8 x 8 blocks (192 numbers each), every later group of 8 frames into 8 x 8 x 8 blocks (1536
numbers); each block is projected on 16 orthonormal directions. So 8k+1 frames give k+1 latents at an eighth of the
size, 16 channels, as PyramidFlow's causal VAE does (M4V paper, section on the backbone), with a few 100 kB of weights.
A group is coded alone, so the code is exactly causal, chunking changes nothing, and a prefix of the frames gives a
prefix of the latents. Both directions are linear: gradients pass.

Scaling for diffusion. An orthonormal code keeps the pixels' own energy: the mean brightness of a block has a standard
deviation ten to thirty times that of the sixteenth channel. Dividing by one number (PyramidFlow's way) would leave the
fine channels under the noise until the last few percent of the flow; dividing each by its own deviation would give the
sixteenth channel, worth a thousandth of the energy, the same say in the loss as the brightness, and blow up what
little it holds. We take the middle: channel k is divided by `r * sqrt(std_k)` with one r per kind of latent, so that a
channel keeps the square root of its weight, and r makes the mean normalised variance 1, as flow matching from unit
noise wants. Deviations below 1e-3 of the largest count as that floor.

Legend: `b` blocks of space, `c` channels, `t` frames or latents, `h` `w` pixels or grid, `k` numbers of a block.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from m4v_dist import storage, tensor_files
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.weights_file import SAFETENSORS, read_layout, require_layout

EMBEDDED_WEIGHTS = str(Path(__file__).parent / "assets" / "pca_codec.safetensors")
BLOCK = 8
"""Side of a block in pixels, and frames of a group."""
DEFAULT_CHANNELS = 16
"""PyramidFlow's, and what a file of other tensors is compared with."""
STD_FLOOR = 1e-3
_TENSORS = {"first_basis", "first_mean", "later_basis", "later_mean"}
_STATISTICS = {"first_latent_mean", "first_latent_scale", "later_latent_mean", "later_latent_scale"}


@dataclass(frozen=True)
class PcaWeights:
    """What the codec is made of.

    Args:
        tensors: `first_basis` 192 c, `later_basis` 1536 c (orthonormal columns), `first_mean` 192, `later_mean` 1536,
            and the four statistics of `LatentNormalization`, c each; all float32.
        provenance: clips, package versions, block counts, explained variance; for people.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, object]

    def to_bytes(self) -> bytes:
        """Safetensors bytes; one metadata key, because the order of several is not fixed."""
        return tensor_files.tensors_to_bytes(self.tensors, {"provenance": json.dumps(self.provenance, sort_keys=True)})


class PcaCodec:
    """Frames to latents and back; see the module's docstring. Holds no trainable parameter."""

    name = "pca"
    spatial_stride = BLOCK
    temporal_stride = BLOCK

    def __init__(self, tensors: dict[str, Tensor], weights_sha256: str) -> None:
        self._tensors = {name: tensors[name].float() for name in _TENSORS}
        self._weights_sha256 = weights_sha256
        self.latent_channels = tensors["first_basis"].shape[1]
        self.normalization = LatentNormalization(
            *(tuple(tensors[name].tolist()) for name in sorted(_STATISTICS))  # first mean, scale, later mean, scale
        )

    @classmethod
    def from_file(cls, path: str) -> "PcaCodec":
        """Load the weights from a safetensors file, local or s3://.

        Raises:
            ConfigError: no such file, or one of another ending.
            DataError: it is damaged, no safetensors file, or holds other tensors.
        """
        if not storage.is_file(path):
            raise ConfigError(
                f"codec.weights={storage.shown(path)}: no such file; leave it out to take the embedded basis."
            )
        if not path.endswith(SAFETENSORS):
            raise ConfigError(
                f"codec.weights={path}: codec.kind='pca' reads a {SAFETENSORS[0]} file, as `python -m jobs.fit_codec` "
                "writes it; give one, or set codec.kind='pyramid' for PyramidFlow's VAE."
            )
        layout = read_layout(path)
        basis = layout.get("first_basis")
        require_layout(
            f"codec.weights={path}",
            layout,
            _wanted(basis.shape[-1] if basis is not None and basis.shape else DEFAULT_CHANNELS),
            "Write them with `python -m jobs.fit_codec`, or leave codec.weights out to take the embedded basis.",
        )
        return cls.from_bytes(storage.read_bytes(path))

    @classmethod
    def from_bytes(cls, data: bytes) -> "PcaCodec":
        """Build from the bytes of a whole file of `PcaWeights`."""
        return cls(tensor_files.tensors_from_bytes(data), hashlib.sha256(data).hexdigest())

    def fingerprint(self) -> dict[str, str]:
        """Name, sha256 of the weight file, and geometry: what makes two caches exchangeable."""
        geometry = f"block 8x8x1 then 8x8x8, {self.latent_channels} channels"
        return {"codec": self.name, "codec_weights_sha256": self._weights_sha256, "codec_config": geometry}

    def encode(self, frames: Tensor, *, seed: int | None = None) -> Tensor:
        """Code a clip.

        Args:
            frames: t h w c, float in [-1, 1], t = 8k+1, h and w multiples of 8. Gradients pass.
            seed: without effect, since nothing is drawn here; the codecs' common signature.

        Returns:
            c t h w, float32, un-normalised: k+1 latents at an eighth of the size.

        Raises:
            ValueError: a shape that breaks these rules.
        """
        self._check_frames(frames)
        grid_height = frames.shape[1] // BLOCK
        latents = [self._project(frames[:1], "first", grid_height)]
        # one product per group: memory does not grow with the clip, and a prefix gives the same bits
        for start in range(1, len(frames), BLOCK):
            latents.append(self._project(frames[start : start + BLOCK], "later", grid_height))
        return torch.cat(latents, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents c t h w, un-normalised, to frames t h w c, float32 about [-1, 1] (not clamped)."""
        if latents.ndim != 4 or latents.shape[0] != self.latent_channels or latents.shape[1] == 0:
            raise ValueError(
                f"pca codec: latents must be c t h w with c={self.latent_channels} and t > 0, got "
                f"{tuple(latents.shape)}; decode latents of this codec only."
            )
        frames = [self._restore(latents[:, :1], "first", frames_of_group=1)]
        for start in range(1, latents.shape[1]):
            frames.append(self._restore(latents[:, start : start + 1], "later", frames_of_group=BLOCK))
        return torch.cat(frames)

    def decode_last(self, context: Tensor, last: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode the latent c 1 h w that follows `context` c t h w: 8 frames, or 1 without context; see `Codec`.

        A latent is decoded alone here, so the context only says which kind it is, and there is nothing to recompute.
        """
        if last.ndim != 4 or last.shape[1] != 1 or context.ndim != 4 or context[:, :0].shape != last[:, :0].shape:
            raise ValueError(
                f"pca codec: decode_last wants context c t h w and one latent c 1 h w of its size, got "
                f"{tuple(context.shape)} and {tuple(last.shape)}."
            )
        if context.shape[1] == 0:
            return self.decode(last)
        return self._restore(last, "later", frames_of_group=BLOCK)

    def _project(self, frames: Tensor, kind: str, grid_height: int) -> Tensor:
        basis, mean = self._weights(kind, frames.device)
        group = 1 if kind == "first" else BLOCK
        blocks = to_blocks(frames, group)
        latents = (blocks - mean) @ basis
        return rearrange(latents, "(t h w) c -> c t h w", t=len(frames) // group, h=grid_height)

    def _restore(self, latents: Tensor, kind: str, frames_of_group: int) -> Tensor:
        basis, mean = self._weights(kind, latents.device)
        blocks = rearrange(latents.float(), "c t h w -> (t h w) c") @ basis.T + mean
        return rearrange(
            blocks,
            "(t h w) (group row column c) -> (t group) (h row) (w column) c",
            t=latents.shape[1], h=latents.shape[2], group=frames_of_group, row=BLOCK, column=BLOCK,
        )  # fmt: skip

    def _weights(self, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
        return self._tensors[f"{kind}_basis"].to(device), self._tensors[f"{kind}_mean"].to(device)

    def _check_frames(self, frames: Tensor) -> None:
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.is_floating_point():
            raise ValueError(
                f"pca codec: frames must be float t h w 3 in [-1, 1], got {frames.dtype} {tuple(frames.shape)}."
            )
        if len(frames) % BLOCK != 1 or frames.shape[1] % BLOCK or frames.shape[2] % BLOCK:
            raise ValueError(
                f"pca codec: {len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} break the 8k+1 frame rule "
                f"or the multiple of 8; cut to {(len(frames) - 1) // BLOCK * BLOCK + 1} frames, or crop."
            )


def _wanted(channels: int) -> dict[str, Tensor]:
    """The tensors of a codec of so many channels, on the meta device."""
    shapes = dict.fromkeys(_STATISTICS, (channels,)) | {
        "first_basis": (3 * BLOCK**2, channels), "first_mean": (3 * BLOCK**2,),
        "later_basis": (3 * BLOCK**3, channels), "later_mean": (3 * BLOCK**3,),
    }  # fmt: skip
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def to_blocks(frames: Tensor, group: int) -> Tensor:
    """Cut frames t h w c into blocks of `group` frames by 8 by 8 pixels: `(t h w) k`, float32."""
    return rearrange(
        frames.float(),
        "(t group) (h row) (w column) c -> (t h w) (group row column c)",
        group=group, row=BLOCK, column=BLOCK,
    )  # fmt: skip


class BlockStatistics:
    """Running mean and covariance of blocks, in float64, and the PCA of them."""

    def __init__(self, block_size: int) -> None:
        self.count = 0
        self._sum = torch.zeros(block_size, dtype=torch.float64)
        self._outer = torch.zeros(block_size, block_size, dtype=torch.float64)

    def add(self, blocks: Tensor) -> None:
        """Add blocks `b k`; the products are summed in float64 from float32 chunks of 4096 blocks."""
        for chunk in blocks.split(4096):
            self.count += len(chunk)
            self._sum += chunk.double().sum(0)
            self._outer += (chunk.T @ chunk).double()

    def fit(self, channels: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return basis `k c`, mean `k`, deviations `c` and the explained fraction of the variance."""
        mean = self._sum / self.count
        covariance = self._outer / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        order = torch.argsort(values, descending=True)[:channels]
        explained = float(values[order].sum() / values.clamp_min(0).sum())
        return vectors[:, order], mean, values[order].clamp_min(0).sqrt(), explained


def fit_pca_weights(clips: Iterable[Tensor], channels: int, provenance: dict[str, object]) -> PcaWeights:
    """Fit both bases and the latent statistics.

    Args:
        clips: each t h w c, float in [-1, 1], t = 8k+1. Every frame is also used for the first-frame basis.
        channels: latent channels c.
        provenance: where the clips came from; counts and explained variance are added.
    """
    first, later = BlockStatistics(3 * BLOCK**2), BlockStatistics(3 * BLOCK**3)
    for clip in clips:
        # every fourth frame may open a clip or be an image; the others are all but copies of it
        first.add(to_blocks(clip[::4], group=1))
        later.add(to_blocks(clip[1:], group=BLOCK))
    tensors: dict[str, Tensor] = {}
    notes = dict(provenance)
    first_basis, first_mean, first_std, first_explained = first.fit(channels)
    later_basis, later_mean, later_std, later_explained = later.fit(channels)
    first_basis = first_basis * _signs(first_basis)
    # a later direction points the way of the first-frame direction that its time mean is nearest to, so that the
    # model sees brightness or a gradient with one sign in both kinds of latent
    time_mean = rearrange(later_basis, "(group k) c -> group k c", group=BLOCK).mean(0)
    overlap = first_basis.T @ time_mean
    nearest = overlap.gather(0, overlap.abs().argmax(0, keepdim=True))[0]
    is_still = nearest.abs() * BLOCK**0.5 > 0.5
    later_basis = later_basis * torch.where(is_still, nearest.sign(), _signs(later_basis))
    for kind, basis, mean, std in (
        ("first", first_basis, first_mean, first_std),
        ("later", later_basis, later_mean, later_std),
    ):
        tensors[f"{kind}_basis"], tensors[f"{kind}_mean"] = basis.float(), mean.float()
        tensors[f"{kind}_latent_mean"] = torch.zeros(channels)
        tensors[f"{kind}_latent_scale"] = diffusion_scale(std).float()
    notes |= {
        "channels": channels,
        "first_blocks": first.count,
        "later_blocks": later.count,
        "first_explained_variance": round(first_explained, 5),
        "later_explained_variance": round(later_explained, 5),
        "first_std": [round(float(value), 4) for value in first_std],
        "later_std": [round(float(value), 4) for value in later_std],
    }
    return PcaWeights({name: tensor.contiguous() for name, tensor in tensors.items()}, notes)


def diffusion_scale(std: Tensor) -> Tensor:
    """What each channel is divided by: `r * sqrt(std)`, r such that the mean normalised variance is 1.

    Normalised, channel k has deviation `sqrt(std_k) / r`, so its variance is `std_k / r^2` and the mean over channels
    is 1 for `r^2 = mean(std)`.
    """
    floored = std.clamp_min(STD_FLOOR * float(std.max()))
    return (floored * floored.mean()).sqrt()


def _signs(basis: Tensor) -> Tensor:
    """Sign of each column's largest entry, so that a fit does not depend on the solver's choice."""
    return basis.gather(0, basis.abs().argmax(0, keepdim=True))[0].sign()
