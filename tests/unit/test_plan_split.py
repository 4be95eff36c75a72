"""The even split of DiT blocks over stages."""

from __future__ import annotations

import pytest

from shared.engine.plan.split import split_blocks


def test_thirty_blocks_on_four_stages():
    assert split_blocks(30, 4) == [range(8), range(8, 16), range(16, 23), range(23, 30)]


@pytest.mark.parametrize("layers", [1, 3, 6, 30, 40])
def test_every_split_covers_all_blocks_once_and_is_even(layers: int):
    for stages in range(1, layers + 1):
        parts = split_blocks(layers, stages)
        assert [block for part in parts for block in part] == list(range(layers))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("stages", [0, 7])
def test_a_stage_without_a_block_is_refused(stages: int):
    with pytest.raises(ValueError, match="1…6 stages are possible"):
        split_blocks(6, stages)
