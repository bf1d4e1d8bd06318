"""What one actor of a precompute holds in memory, by arithmetic: a bound that no number of clips or shards moves.

Per actor process, beside Python, torch and the encoders' own weights and activations:

    media   CALLS_PER_ACTOR x (media_mib_in_flight + 3 clips)      read ahead, not decoded yet
    frames  (decode_processes + 3) x F                             decoded ahead, and the one in work with its copy
    encoder 4 x F                                                  the frames as float32

with F = num_frames x height x width x 3 bytes of the largest bucket. The three clips: one waits for room, one is being
read behind it, and one was just decoded. A media file larger than media_mib_in_flight waits until nothing else of its
shard is held, and then takes the place of that setting. Each decoder child holds one media file and about 2 F. What the
allocator keeps comes on top: 11 MiB where it was measured (tests/data_pipeline/test_actor_memory.py).
"""

from dataclasses import dataclass

from data_pipeline.precompute_plan import PrecomputePlan

CALLS_PER_ACTOR = 2
"""Shards that an actor is given at once: one is read while another is encoded, and encoded while that is committed."""


@dataclass(frozen=True)
class ActorMemory:
    """Bytes of one actor, see above.

    Args:
        media, frames, encoder: of the process.
        children: of all its decoder children together.
    """

    media: int
    frames: int
    encoder: int
    children: int

    def __str__(self) -> str:
        parts = ((self.media, "media"), (self.frames, "frames"), (self.encoder, "frames as float32"))
        return (
            f"{(self.media + self.frames + self.encoder) / 2**20:.0f} MiB an actor ("
            f"{' + '.join(f'{size / 2**20:.0f} {name}' for size, name in parts)}) beside its encoders, and "
            f"{self.children / 2**20:.0f} MiB in its decoder children"
        )


def actor_memory(plan: PrecomputePlan, largest_clip_bytes: int, num_calls: int = CALLS_PER_ACTOR) -> ActorMemory:
    """The bound of a plan.

    Args:
        plan: sizes, and how far ahead is read and decoded.
        largest_clip_bytes: of the media files.
        num_calls: shards at once.
    """
    settings = plan.precompute
    buckets = [bucket for source in plan.sources for bucket in plan.buckets_of(source.name)]
    frames = settings.num_frames * max(bucket.height_px * bucket.width_px for bucket in buckets) * 3
    in_flight = max(settings.media_mib_in_flight * 2**20, largest_clip_bytes)
    return ActorMemory(
        media=num_calls * (in_flight + 3 * largest_clip_bytes),
        frames=(settings.decode_processes + 3) * frames,
        encoder=4 * frames,
        children=settings.decode_processes * (largest_clip_bytes + 2 * frames),
    )
