"""Documents → blocks of `block_len` tokens.

`concat`    documents one after another, cut at block ends; the last block of a part is padded.
`best_fit`  no document of up to `block_len` tokens is cut: documents wait until a window is full, then are packed
            by best-fit decreasing (D. S. Johnson, 1973). Of longer documents whole blocks come off the front and
            the rest waits with the others.
`none`      one document a block, padded; longer documents are cut into several.

Pure and resumable: the blocks depend on the sequence of documents alone, not on when they are taken, and
`state()` holds everything a fresh packer needs to go on.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from chimera.convert.stream_settings import PACKINGS

MOST_WAITING = 1 << 24  # tokens of a window, so that long blocks keep within a worker's memory
Array = NDArray[Any]


class Packer:
    """Packs one part of a stream.

    `masked` packers (chat streams) carry a bool for each token through the same moves. `window` is the number of
    blocks' worth of tokens `best_fit` looks at together, `MOST_WAITING` at most.
    """

    def __init__(
        self,
        block_len: int,
        pad_id: int,
        packing: str = "concat",
        *,
        dtype: DTypeLike = np.uint16,
        masked: bool = False,
        window: int = 256,
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing `{packing}`: one of {', '.join(PACKINGS)} is needed")
        self.block_len, self.pad_id, self.packing = block_len, pad_id, packing
        self.dtype, self.masked = np.dtype(dtype), masked
        self._window = min(window * block_len, MOST_WAITING)  # tokens
        self._waiting: list[Array] = []  # documents (or their rests) not yet in a block
        self._waiting_masks: list[Array] = []
        self._waiting_tokens = 0
        self._ready: list[Array] = []  # tokens of finished blocks, each a whole number of them
        self._ready_masks: list[Array] = []
        self._ready_fill: list[int] = []  # tokens before the padding, one a ready block

    def add(self, ids: Array, mask: Array | None = None) -> None:
        """One document: `ids` [n] ending with EOS and, when `masked`, `mask` [n] bool."""
        if self.masked != (mask is not None):
            raise ValueError("a mask is given if and only if the packer is `masked`")
        whole = 0 if self.packing == "concat" else len(ids) // self.block_len * self.block_len
        if whole:
            self._emit([ids[:whole]], [mask[:whole]] if mask is not None else [])
            ids, mask = ids[whole:], mask[whole:] if mask is not None else None
        if not len(ids):
            return
        self._waiting.append(ids)
        if mask is not None:
            self._waiting_masks.append(mask)
        self._waiting_tokens += len(ids)
        if self.packing == "none":
            self._pack([[0]])
        elif self.packing == "best_fit" and self._waiting_tokens >= self._window:
            self._best_fit()

    def add_texts(self, ids: Array, ends: Array) -> None:
        """Several documents of a packer without masks: `ids` one after another, `ends` [documents + 1] theirs."""
        if self.packing == "concat":  # to which the documents' ends are nothing
            self.add(ids)
            return
        for begin, end in pairwise(ends.tolist()):
            self.add(ids[begin:end].copy())  # or one that waits long would keep all of them in memory

    def flush(self) -> None:
        """The end of the part: whatever waits becomes blocks, the last of them padded."""
        if self.packing == "best_fit":
            self._best_fit()
        elif self._waiting:
            self._pack([range(len(self._waiting))])

    def take(self) -> tuple[Array, Array | None, int]:
        """The finished blocks: tokens [n, block_len], masks [n, block_len] or None, padding tokens."""
        whole = self._waiting_tokens // self.block_len * self.block_len
        if self.packing == "concat" and whole:
            self._concat(whole)
        if not self._ready_fill:
            shape = (0, self.block_len)
            return np.empty(shape, self.dtype), np.empty(shape, np.bool_) if self.masked else None, 0
        tokens = self._join(self._ready, self.dtype).reshape(-1, self.block_len)
        masks = self._join(self._ready_masks, np.bool_).reshape(-1, self.block_len) if self.masked else None
        padding = tokens.size - sum(self._ready_fill)
        self._ready, self._ready_masks, self._ready_fill = [], [], []
        return tokens, masks, padding

    def state(self) -> dict[str, Array]:
        """Everything a fresh packer of the same settings needs to go on, as flat arrays."""
        return {
            "waiting": self._join(self._waiting, self.dtype),
            "waiting_mask": self._join(self._waiting_masks, np.bool_),
            "waiting_lengths": np.array([len(ids) for ids in self._waiting], dtype=np.int64),
            "ready": self._join(self._ready, self.dtype),
            "ready_mask": self._join(self._ready_masks, np.bool_),
            "ready_fill": np.array(self._ready_fill, dtype=np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from another packer's `state()`; whatever this one held is forgotten."""
        ends = np.cumsum(state["waiting_lengths"])[:-1]
        some = len(state["waiting_lengths"]) > 0
        self._waiting = np.split(state["waiting"].astype(self.dtype), ends) if some else []
        self._waiting_masks = np.split(state["waiting_mask"].astype(bool), ends) if some and self.masked else []
        self._waiting_tokens = int(state["waiting_lengths"].sum())
        self._ready = [state["ready"].astype(self.dtype)]
        self._ready_masks = [state["ready_mask"].astype(bool)] if self.masked else []
        self._ready_fill = [int(fill) for fill in state["ready_fill"]]

    def _best_fit(self) -> None:
        lengths = [len(ids) for ids in self._waiting]
        self._pack(best_fit_decreasing(lengths, self.block_len))

    def _concat(self, whole: int) -> None:
        """Move the first `whole` waiting tokens (a multiple of block_len) to the finished blocks."""
        tokens = self._join(self._waiting, self.dtype)
        masks = [self._join(self._waiting_masks, np.bool_)] if self.masked else []
        self._emit([tokens[:whole]], [mask[:whole] for mask in masks])
        self._waiting_tokens = len(tokens) - whole
        self._waiting = [tokens[whole:]] if self._waiting_tokens else []
        self._waiting_masks = [mask[whole:] for mask in masks] if self._waiting_tokens else []

    def _pack(self, bins: Any) -> None:
        """Make one block (or, of `concat`'s rest, several) of each bin of waiting documents and clear them."""
        for bin_ in bins:
            ids = [self._waiting[i] for i in bin_]
            masks = [self._waiting_masks[i] for i in bin_] if self.masked else []
            self._emit(ids, masks)
        self._waiting, self._waiting_masks, self._waiting_tokens = [], [], 0

    def _emit(self, ids: list[Array], masks: list[Array]) -> None:
        """Append documents to the finished blocks, padded to a block's end."""
        total = sum(len(part) for part in ids)
        blocks = -(-total // self.block_len)
        padding = blocks * self.block_len - total
        self._ready += ids
        self._ready_masks += masks
        if padding:
            self._ready.append(np.full(padding, self.pad_id, dtype=self.dtype))
            if self.masked:
                self._ready_masks.append(np.zeros(padding, dtype=np.bool_))
        self._ready_fill += [self.block_len] * (blocks - 1) + [self.block_len - padding]

    @staticmethod
    def _join(parts: list[Array], dtype: DTypeLike) -> Array:
        joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])
        return joined.astype(dtype, copy=False)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each summing to at most `capacity`: longest first into the fullest bin with room.

    Bins, and documents in a bin, come in order of arrival. The open bins are found through a bit set of their free
    space, so a document costs one shift of a `capacity`-bit integer.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while a bin with r tokens of room is open
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            bin_ = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, bin_ = capacity, []
            bins.append(bin_)
        bin_.append(index)
        if room > length:
            by_room[room - length].append(bin_)
            rooms |= 1 << (room - length)
    for bin_ in bins:
        bin_.sort()
    return sorted(bins)
