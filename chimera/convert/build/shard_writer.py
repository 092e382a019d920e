"""A part's share of `train` or `eval`: from documents to shards, each written when it is full."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from chimera.cli import UserError
from chimera.convert.build.part_state import SplitState
from chimera.convert.build.store import Uploader
from chimera.convert.pack.packing import Packer
from chimera.mds import Array, ShardFormat, file_of, is_whole, write_shard

SLICE = 1 << 22  # tokens of a longer document that are packed at a time


class ShardWriter:
    """The packer, and the blocks that wait for a shard.

    `folder` takes the shards, `part` goes into their names, `state` counts what came, `waiting` is what an earlier
    `arrays()` held.
    """

    def __init__(
        self,
        shard_format: ShardFormat,
        folder: Path,
        part: str,
        state: SplitState,
        packer: Packer,
        waiting: dict[str, Array],
    ) -> None:
        self.shard_format, self.folder, self.part, self.state, self.packer = shard_format, folder, part, state, packer
        self.sent = 0  # shards handed to the uploader
        self.changed = False  # whether more waits than `arrays()` held last
        waiting = dict(waiting)
        self.blocks: list[Array] = [waiting.pop("blocks")[state.passed :]] if "blocks" in waiting else []
        self.masks: list[Array] = [waiting.pop("masks")[state.passed :]] if "masks" in waiting else []
        if waiting:
            self.packer.restore(waiting)

    def add(self, ids: Array, mask: Array | None, begin: int = 0) -> Iterator[int]:
        """Pack a document, its first `begin` tokens being packed already: a long one in slices.

        Yields, between slices, how many of its tokens are packed: what they fill may be written and committed then,
        so that a document is in memory once and what a kill costs does not grow with it. Slices of whole blocks give
        the blocks of the whole document, whatever the packing.
        """
        if mask is not None and self.shard_format.starts and self.packer.packing != "concat":
            mask = mask.copy()
            mask[:: self.shard_format.block_len] = True  # the rest of a long one may stand behind another's end
        step = max(1, SLICE // self.shard_format.block_len) * self.shard_format.block_len
        if len(ids) <= step:
            self._pack(ids, mask)
        else:
            for end in range(begin + step, len(ids) + step, step):
                piece = slice(end - step, end)  # copied, or what is left over would keep the whole document
                self._pack(ids[piece].copy(), mask[piece].copy() if mask is not None else None)
                if end < len(ids):
                    yield end
        self.state.documents += 1
        self.state.tokens += len(ids)

    def add_texts(self, ids: Array, ends: Array) -> None:
        """Pack texts that are not long: `ids` one after another, `ends` [texts + 1] as those of `Encoded`."""
        self.changed = True
        self.packer.add_texts(ids, ends)
        self.state.documents += len(ends) - 1
        self.state.tokens += len(ids)

    def write(self, rest: bool = False) -> bool:
        """Write one shard if enough blocks wait for a full one (with `rest`: if any do); whether it did."""
        self._take()
        waiting, full = sum(len(blocks) for blocks in self.blocks), self.shard_format.blocks_per_shard
        if waiting < (1 if rest else full):
            return False
        blocks = np.concatenate(self.blocks)
        masks = np.concatenate(self.masks) if self.masks else None
        name = f"shard.{self.part}.{len(self.state.shards):05d}"
        now = masks[:full] if masks is not None else None
        self.state.shards.append(write_shard(self.shard_format, self.folder, name, blocks[:full], now))
        self.blocks, self.masks = [blocks[full:]], [masks[full:]] if masks is not None else []
        self.state.passed += min(full, waiting)
        return True

    def send(self, uploader: Uploader, stream: str) -> None:
        """Hand the shards that are still here to the uploader, each once. Raises `UserError` for a damaged one."""
        for entry in self.state.shards[self.sent :]:
            file = self.folder / file_of(entry)["basename"]
            if file.exists():
                if not is_whole(entry, file.read_bytes()):
                    part = self.folder.parent
                    raise UserError(f"{file} is damaged: remove {part} and run the same command again")
                uploader.upload(file, f"{stream}/{self.folder.name}/{file.name}")
        self.sent = len(self.state.shards)

    def arrays(self) -> dict[str, Array]:
        """What waits for a shard, for the part's state, whose `passed` counts from here on."""
        self.changed, self.state.passed = False, 0
        found = {"blocks": np.concatenate(self.blocks)} if self.blocks else {}
        if self.masks:
            found["masks"] = np.concatenate(self.masks)
        return {**self.packer.state(), **found}

    def _pack(self, ids: Array, mask: Array | None) -> None:
        self.changed = True
        self.packer.add(ids, mask)

    def _take(self) -> None:
        """Collect the blocks the packer has finished."""
        blocks, masks, padding = self.packer.take()
        if len(blocks):
            self.changed = True
            self.blocks.append(blocks)
            if masks is not None:
                self.masks.append(masks)
            self.state.blocks += len(blocks)
            self.state.padding += padding
