"""Which stage holds which DiT blocks when nothing is known about their costs: contiguous and as even as it goes."""

from __future__ import annotations


def split_blocks(layers: int, stages: int) -> list[range]:
    """``stages`` contiguous ranges that cover 0…layers−1 in order; lengths differ by at most one.

    The longer ranges come first. Raises ValueError unless 1 ≤ stages ≤ layers: a stage without a block would only add a
    hop.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} DiT blocks cannot be split over {stages} stages: 1…{layers} stages are possible")
    size, longer = divmod(layers, stages)
    ends = [size * (stage + 1) + min(stage + 1, longer) for stage in range(stages)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
