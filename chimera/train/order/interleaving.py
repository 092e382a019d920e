"""The interleaving of a phase: which stream each block comes from, as a sequence that repeats.

Built with Tijdeman's rule for the chairman assignment problem (R. Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980): after *every* prefix of n blocks each of k streams has had its share n·λ within
1 − 1/(2k−2) < 1 block, and no rule can promise less. The period is the least common denominator of the proportions;
after it the error is 0 and the sequence starts again. So counts before any position are arithmetic: (whole periods) +
(a look-up in one period).
"""

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

MAX_PERIOD = 1_000_000  # blocks; a longer one is refused (1 s and 20 MB to build at this length)


class Interleaving:
    """The interleaving of one phase: `stream_at[n % period]` is the stream of a lane's n-th block.

    `stream_at` int32 and `earlier` int64 are [length]: the stream's number, and how often it came before in the period;
    `length` is the period, or less where the phase ends before it. Where two streams are due alike the one that is
    first in `shares` comes.
    """

    def __init__(self, shares: Mapping[int, Fraction], length: int) -> None:
        self.period = lcm(*(share.denominator for share in shares.values()))
        self.weights = {stream: int(share * self.period) for stream, share in shares.items()}
        order = tijdeman(list(self.weights.values()), min(self.period, length))
        self.stream_at = np.array(list(shares), np.int32)[order]
        self.earlier = np.zeros(len(order), np.int64)
        self._places = {stream: np.flatnonzero(self.stream_at == stream) for stream in shares}
        for places in self._places.values():
            self.earlier[places] = np.arange(len(places))

    def count(self, stream: int, n: int) -> int:
        """How many of a lane's first `n` blocks of the phase come from `stream`."""
        if stream not in self.weights:
            return 0
        periods, rest = divmod(n, self.period)
        return periods * self.weights[stream] + int(np.searchsorted(self._places[stream], rest))


def tijdeman(weights: Sequence[int], length: int) -> npt.NDArray[np.int64]:
    """The first `length` entries of the sequence in which stream i comes `weights[i]` times a period, [length].

    Tijdeman's rule in its scheduling form: with D = 2k − 2, the j-th block of stream i (from 0) may come from place
    n ≥ (j + 1/D) / λ on (places from 1), and of those that may, the one with the earliest deadline
    (j + 1 − 1/D) / λ comes; equal deadlines go by i. Kept in integers by the factor D · lcm(weights) / period.
    """
    order = np.zeros(length, np.int64)
    if len(weights) == 1:
        return order
    period, d, scale = sum(weights), 2 * len(weights) - 2, lcm(*weights)

    def release(i: int, j: int) -> int:
        return -(-period * (j * d + 1) // (d * weights[i]))

    waiting = [(release(i, 0), i, 0) for i in range(len(weights))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for n in range(1, length + 1):
        while waiting and waiting[0][0] <= n:
            _, i, j = heapq.heappop(waiting)
            heapq.heappush(ready, (((j + 1) * d - 1) * (scale // weights[i]), i, j))
        _, i, j = heapq.heappop(ready)
        order[n - 1] = i
        heapq.heappush(waiting, (release(i, j + 1), i, j + 1))
    return order
