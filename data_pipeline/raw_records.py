"""Which records of a raw shard can be used at all, before anything is decoded: one rule for both passes."""

from data_pipeline.pack import RawClip


def fault_of(raw: RawClip, seen: set[str]) -> str | None:
    """Why a record cannot be used, or None.

    Args:
        raw: the record.
        seen: keys of the shard's records before it; this one's is added.
    """
    is_second = raw.key in seen
    seen.add(raw.key)
    if is_second:
        return "key stands twice in the shard"
    if raw.kind is None:
        return "no media member of a known kind"
    if raw.fault is not None:
        return raw.fault
    return None if raw.captions else "caption is missing"
