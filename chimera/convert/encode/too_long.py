"""Which documents are packed: none of too few tokens; of conversations longer than a block as `too_long` says."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chimera.mds import Array

if TYPE_CHECKING:
    from chimera.convert.stream_settings import StreamSettings

TOO_FEW = "too_few_tokens"
Fitted = tuple[Array, Array | None, str | None]  # ids, mask, and what was done as it is longer than a block


def fitted(
    ids: Array, mask: Array | None, answers: Sequence[int], stream: "StreamSettings", room: int, bos: int
) -> Fitted | str:
    """A document as it is packed, or why it is not.

    `ids` and `mask` are [length], with EOS at the end; a text's first `bos` are its BOS. `room` is a block's length.
    """
    if len(ids) - 1 - (bos if mask is None else 0) < stream.min_tokens:
        return TOO_FEW
    if mask is None or len(ids) <= room:
        return ids, mask, None
    end = shortened(ids, answers, mask, room) if stream.too_long == "turns" else None
    if end is not None:
        more = 0 if ids[end - 1] == ids[-1] else 1  # EOS, where the answer does not end with it
        return np.append(ids[:end], ids[-1:][:more]), np.append(mask[:end], [False] * more), stream.too_long
    return "too_long" if stream.too_long != "cut" else (ids, mask, stream.too_long)


def shortened(ids: Array, answers: Sequence[int], mask: Array, room: int) -> int | None:
    """How many of a conversation's `ids` to keep, so that with EOS, which ends them, they are at most `room`.

    `answers` are the ids before and with the end of each of its answers. `None` where no answer that is learned (`mask`
    [length] bool) ends in time.
    """
    end = max((end for end in answers if end + (ids[end - 1] != ids[-1]) <= room), default=0)
    return end if len(ids) > room and mask[1:end].any() else None  # none is learned first
