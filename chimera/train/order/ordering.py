"""Stream position → block: an endless, non-repeating order of each stream, computed where it is needed.

Position i of a stream of n blocks lies in pass i // n; each pass is a permutation of all blocks. With C lanes,
lane c takes positions c, c + C, c + 2C, … of the stream, and in each pass owns one contiguous run of the stream's
blocks, exactly as long as it has positions in that pass. Lanes advance alike, so no block comes twice before its
stream is exhausted, whatever the number of lanes, shards or blocks; and two lanes share a shard only at the
border between their runs (which moves by at most a block from pass to pass).

In a lane's run the pieces (whole shards, but for the borders) are permuted, and the blocks shuffled inside windows
of consecutive pieces: a window takes pieces until it has `WINDOW_BLOCKS` blocks or `WINDOW_PIECES` pieces. A
position is computed from its pass's list of pieces, O(shards), and its window; a reader touches one window's
shards at a time. Windows are the unit of shuffling: a larger one mixes better and needs more shards at once.

Shuffles are `argsort`s of a Philox stream keyed by a hash of (seed, stream name, pass, lane, window). NumPy promises
that raw bit streams stay as they are over versions (NEP 19), which it does not for `Generator.permutation`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chimera.train.order.schedule import Plan

ORDER_VERSION = 1  # goes up when anything here changes the order; stored in checkpoints
WINDOW_BLOCKS = 65_536
WINDOW_PIECES = 64

Ints = npt.NDArray[np.int64]
_NONE: Ints = np.zeros(0, np.int64)


class BlockRef(NamedTuple):
    """One block of a step: the stream's running count, its pass, and where the block lies."""

    stream: str
    position: int
    pass_: int
    shard: int
    block: int


@dataclass(frozen=True)
class Window:
    """A lane's positions [first, end) that are shuffled together, and the shards they lie in."""

    pass_: int
    pieces: slice  # of the pass
    first: int
    end: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class _Pass:
    """A lane's part of one pass: pieces in shuffled order, and the windows they are grouped in."""

    first: int  # the lane's position the pass begins at
    starts: Ints  # [pieces] first block of each
    ends: Ints
    offsets: Ints  # [pieces + 1] positions before each piece, in the pass
    windows: Ints  # [windows + 1] first piece of each window


class StreamOrder:
    """The order of one stream's blocks in every lane; `shard_blocks` is the number of blocks of each shard."""

    def __init__(self, name: str, shard_blocks: Sequence[int] | Ints, seed: int, lanes: int = 1) -> None:
        self.name, self.seed, self.lanes = name, seed, lanes
        self.shard_starts = np.concatenate([[0], np.cumsum(np.asarray(shard_blocks, np.int64))])
        self.blocks = int(self.shard_starts[-1])
        if self.blocks < 1:
            raise ValueError(f"stream {name} has no blocks")
        self._passes: OrderedDict[tuple[int, int], _Pass] = OrderedDict()
        self._shuffled: dict[int, tuple[Window, Ints]] = {}  # of each lane the window read last

    def shard_of(self, blocks: Ints) -> Ints:
        """The shard each block lies in."""
        return np.searchsorted(self.shard_starts, blocks, side="right") - 1

    def take(self, lane: int, first: int, end: int) -> Ints:
        """The blocks at a lane's positions [first, end), int64 [end − first]."""
        parts = []
        while first < end:
            window, blocks = self._shuffled.get(lane, (None, _NONE))
            if window is None or not window.first <= first < window.end:
                window = self.window(lane, first)
                blocks = self._shuffle_window(lane, window)
                self._shuffled[lane] = window, blocks
            stop = min(end, window.end)
            parts.append(blocks[first - window.first : stop - window.first])
            first = stop
        return np.concatenate(parts) if parts else _NONE

    def window(self, lane: int, position: int) -> Window:
        """The window a lane's `position` lies in; cheap, nothing is shuffled."""
        pass_ = (position * self.lanes + lane) // self.blocks
        layout = self._pass(lane, pass_)
        piece = int(np.searchsorted(layout.offsets, position - layout.first, side="right")) - 1
        index = int(np.searchsorted(layout.windows, piece, side="right")) - 1
        first, end = int(layout.windows[index]), int(layout.windows[index + 1])
        return Window(
            pass_,
            slice(first, end),
            layout.first + int(layout.offsets[first]),
            layout.first + int(layout.offsets[end]),
            tuple(self.shard_of(layout.starts[first:end]).tolist()),
        )

    def _shuffle_window(self, lane: int, window: Window) -> Ints:
        """The blocks of a window in order, int64 [end − first]."""
        layout = self._pass(lane, window.pass_)
        starts, ends = layout.starts[window.pieces], layout.ends[window.pieces]
        blocks = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        return blocks[self._shuffle(len(blocks), "window", window.pass_, lane, window.first)]

    def _pass(self, lane: int, pass_: int) -> _Pass:
        """A lane's pieces and windows in one pass; the last few are kept."""
        if (lane, pass_) not in self._passes:
            self._passes[lane, pass_] = self._build_pass(lane, pass_)
            if len(self._passes) > 3 * self.lanes + 1:
                self._passes.popitem(last=False)
        self._passes.move_to_end((lane, pass_))
        return self._passes[lane, pass_]

    def _build_pass(self, lane: int, pass_: int) -> _Pass:
        begin, end = pass_ * self.blocks, (pass_ + 1) * self.blocks
        low, high = (self._before(end, c) - self._before(begin, c) for c in (lane, lane + 1))
        cuts = self.shard_starts[(self.shard_starts > low) & (self.shard_starts < high)]
        starts = np.concatenate([[low], cuts])
        ends = np.concatenate([cuts, [high]])
        keep = ends > starts  # a shard may be empty
        starts, ends = starts[keep], ends[keep]
        order = self._shuffle(len(starts), "pieces", pass_, lane)
        starts, ends = starts[order], ends[order]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        windows = [0]
        while windows[-1] < len(starts):
            full = int(np.searchsorted(offsets, offsets[windows[-1]] + WINDOW_BLOCKS))
            windows.append(min(full, windows[-1] + WINDOW_PIECES, len(starts)))
        return _Pass(-((lane - begin) // self.lanes), starts, ends, offsets, np.array(windows))

    def _before(self, positions: int, lane: int) -> int:
        """How many of the stream's first `positions` fall to lanes below `lane`."""
        rounds, rest = divmod(positions, self.lanes)
        return rounds * lane + min(rest, lane)

    def _shuffle(self, n: int, *what: object) -> Ints:
        """A permutation of range(n) keyed by the seed, the stream's name and `what`."""
        text = "/".join(map(str, (self.seed, self.name, *what)))
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
        return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one segment in global batch order; arrays are [steps, blocks_per_step]."""

    first: int
    streams: npt.NDArray[np.int32]  # numbers of the plan's streams
    positions: Ints  # the stream's running count
    blocks: Ints


class RunOrder:
    """The order of a whole run: the plan's draws joined with the order of each of its streams."""

    def __init__(self, plan: Plan, shard_blocks: Mapping[str, Sequence[int] | Ints], seed: int) -> None:
        self.plan = plan
        self.streams = {name: StreamOrder(name, shard_blocks[name], seed, plan.lanes) for name in plan.streams}

    def steps(self, first: int, end: int) -> Steps:
        """The global batches of steps [first, end), all of one segment: lane by lane in each step."""
        lanes = self.plan.lanes
        letters, drawn = self.plan.draws(first, end)
        blocks = np.empty((lanes, len(letters)), np.int64)
        for number, name in enumerate(self.plan.streams):
            places = np.flatnonzero(letters == number)
            if len(places):
                span = int(drawn[places[0]]), int(drawn[places[-1]]) + 1
                for lane in range(lanes):
                    blocks[lane, places] = self.streams[name].take(lane, *span)
        positions = drawn * lanes + np.arange(lanes)[:, None]

        def by_step(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            """[lanes, steps · per lane] → [steps, lanes · per lane]."""
            steps: npt.NDArray[Any] = values.reshape(lanes, end - first, -1).swapaxes(0, 1).reshape(end - first, -1)
            return steps

        return Steps(first, by_step(np.tile(letters, (lanes, 1))), by_step(positions), by_step(blocks))


def step_blocks(order: RunOrder, step: int) -> list[BlockRef]:
    """What `step` consumes, in global batch order."""
    steps, names = order.steps(step, step + 1), order.plan.streams
    refs = []
    for number, position, block in zip(
        steps.streams[0].tolist(), steps.positions[0].tolist(), steps.blocks[0].tolist(), strict=True
    ):
        stream = order.streams[names[number]]
        shard = int(stream.shard_of(np.array(block)))
        refs.append(BlockRef(stream.name, position, position // stream.blocks, shard, block))
    return refs


def digest(blocks: Iterable[tuple[str, int]]) -> str:
    """The digest of a step: BLAKE2b-128, in hex, of a line `stream/block` for each block in global batch order."""
    text = "".join([f"{stream}/{block}\n" for stream, block in blocks])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
