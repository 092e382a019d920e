"""A part's share of `train` or `eval`: from documents to shards, each written when it is full."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.journal import SplitState
from convert.packing import Packer
from convert.shards import Array, ShardFormat, write_shard

SLICE = 1 << 22  # tokens of a longer document that are packed at a time


class Split:
    """The packer, and the blocks that wait for a shard.

    `folder` takes the shards, `part` goes into their names, `state` counts what came, `waiting` is what an earlier
    `arrays()` held.
    """

    def __init__(
        self, form: ShardFormat, folder: Path, part: str, state: SplitState, packer: Packer, waiting: dict[str, Array]
    ) -> None:
        self.form, self.folder, self.part, self.state, self.packer = form, folder, part, state, packer
        self.sent = 0  # shards handed to the sender
        waiting = dict(waiting)
        self.blocks: list[Array] = [waiting.pop("blocks")] if "blocks" in waiting else []
        self.masks: list[Array] = [waiting.pop("masks")] if "masks" in waiting else []
        if waiting:
            self.packer.restore(waiting)

    def add(self, ids: Array, mask: Array | None, begin: int = 0) -> Iterator[int]:
        """Pack a document, its first `begin` tokens being packed already: a long one in slices.

        Yields, between slices, how many of its tokens are packed: what they fill may be written and committed then,
        so that a document is in memory once and what a kill costs does not grow with it. Slices of whole blocks give
        the blocks of the whole document, whatever the packing.
        """
        step = max(1, SLICE // self.form.block_len) * self.form.block_len
        if len(ids) <= step:
            self.packer.add(ids, mask)
        else:
            for end in range(begin + step, len(ids) + step, step):
                piece = slice(end - step, end)  # copied, or what is left over would keep the whole document
                self.packer.add(ids[piece].copy(), mask[piece].copy() if mask is not None else None)
                if end < len(ids):
                    yield end
        self.state.documents += 1
        self.state.tokens += len(ids)

    def write(self, rest: bool = False) -> bool:
        """Write one shard if enough blocks wait for a full one (with `rest`: if any do); whether it did."""
        self._take()
        waiting, full = sum(len(blocks) for blocks in self.blocks), self.form.blocks_per_shard
        if waiting < (1 if rest else full):
            return False
        blocks = np.concatenate(self.blocks)
        masks = np.concatenate(self.masks) if self.masks else None
        name = f"shard.{self.part}.{len(self.state.shards):05d}"
        now = masks[:full] if masks is not None else None
        self.state.shards.append(write_shard(self.form, self.folder, name, blocks[:full], now))
        self.blocks, self.masks = [blocks[full:]], [masks[full:]] if masks is not None else []
        return True

    def arrays(self) -> dict[str, Array]:
        """What waits for a shard, for the journal."""
        found = {"blocks": np.concatenate(self.blocks)} if self.blocks else {}
        if self.masks:
            found["masks"] = np.concatenate(self.masks)
        return {**self.packer.state(), **found}

    def _take(self) -> None:
        """Collect the blocks the packer has finished."""
        blocks, masks, padding = self.packer.take()
        if len(blocks):
            self.blocks.append(blocks)
            if masks is not None:
                self.masks.append(masks)
            self.state.blocks += len(blocks)
            self.state.padding += padding
