"""Whatever comes in whatever order, every item runs once, in order per slot, and every chunk is accounted for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_scheduler_core import MS, Bench, chunk

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["offer", "finish", "wait", "fault"]), st.integers(0, 2), st.integers(0, 400)),
    min_size=5,
    max_size=80,
)


@settings(max_examples=60, deadline=None)
@given(
    ACTIONS,
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=3, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_every_item_runs_once_and_every_chunk_is_finished_dropped_or_waiting(
    actions: list[tuple[str, int, int]], streams: list[tuple[int, bool]], stages: int, max_batch: int
) -> None:
    bench = Bench(stages=stages)
    bench.core.max_batch = max_batch
    for index, (steps, live) in enumerate(streams):
        bench.stream(f"s{index}", steps=steps, live=live)
    offered = {f"s{index}": 0 for index in range(3)}
    for action, index, ms in actions:
        name = f"s{index}"
        if action == "offer" and name in bench.core.streams:
            live = streams[index][1]
            bench.offer(chunk(name, offered[name], captured_ms=int(bench.now / MS) - ms // 4, live=live))
            offered[name] += 1
        elif action == "finish" and bench.flying:
            bench.finish()
        elif action == "wait":
            bench.now += ms * MS
        elif action == "fault" and ms > 380:
            decisions = bench.core.fault("scripted")
            bench.said.append(decisions)
            bench.flying.clear()
            for stream in decisions.failed:
                bench.core.remove(stream)
        bench.schedule()
        assert len(bench.core.in_flight) <= stages + 1
    while bench.flying:
        bench.now += 200 * MS
        bench.finish()
        bench.schedule()

    started: list[tuple[str, int, int, int]] = []
    finished: dict[str, list[int]] = {name: [] for name in offered}
    for batch in bench.ran:
        taken = [(entry.item.stream, entry.item.slot) for entry in batch.entries]
        assert len(taken) == len(set(taken)), "a slot is in a batch once"
        assert len({(entry.item.frames, batch.height, batch.width) for entry in batch.entries}) == 1
        for entry in batch.entries:
            item = entry.item
            started.append((item.stream, item.block, item.step, batch.generation))
            if item.is_last_step:
                finished[item.stream].extend(stamp.chunk for stamp in entry.stamps)
    assert len(started) == len(set(started)), "no item runs twice"
    for name in offered:
        for step in range(4):
            blocks = [block for stream, block, at, _ in started if stream == name and at == step]
            assert blocks == sorted(blocks), "within a slot, blocks ascend"
    dropped = {
        name: [d.stamp.chunk for said in bench.said for d in said.drops if d.stamp.stream == name] for name in offered
    }
    for name, queue in bench.core.streams.items():
        accounted = sorted(finished[name] + dropped[name] + [waiting.stamp.chunk for waiting in queue.waiting])
        assert accounted == list(range(offered[name])), "each chunk is finished, dropped or waiting, exactly once"
        if not queue.live:
            assert dropped[name] == []
