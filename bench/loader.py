"""Blocks a second of MixtureDataset, plain StreamingDataset and a bare memory map; time to the first batch far out.

`python bench/loader.py [--blocks N] [--seconds N] [--json FILE]` makes its own shards in a temporary folder. All
figures of a run are taken in it, one after another on the same shards; compare ratios, not runs on different machines.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # so imports of the project come after it

import numpy as np

from chimera.mds import ShardFormat, index_bytes, write_shard
from chimera.train.order.schedule import Phase, Plan, Stage, build_plan

BLOCK_LEN, BATCH = 1024, 16
STREAMS = {"en": Fraction(55, 100), "it": Fraction(35, 100), "chat": Fraction(10, 100)}
FORM = ShardFormat(BLOCK_LEN, "uint16", False, None, "xxh3_64", 32 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=60_000, help="blocks on disk, of 2 KB")
    parser.add_argument("--seconds", type=float, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each loader; the best counts")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of each loader, in turn")
    parser.add_argument(
        "--starts", type=int, default=5, help="processes that time their first batch; the median counts"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "batch": BATCH, "block_len": BLOCK_LEN}
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder, "shards"), args.blocks)
        for kind, speeds in throughput(root, Path(folder, "cache"), args).items():
            plain = {workers: speeds[f"streaming, {workers} workers"] for workers in args.workers}
            times = {w: round(speeds[f"mixture, {w} workers"] / plain[w], 1) for w in plain}
            found[f"blocks_per_{kind}"] = {**speeds, "mixture as a multiple of streaming": times}
        if args.starts:
            far = far_shards(Path(folder, "far"))
            found["first_batch"] = far_out(far, Path(folder, "cache"), args.starts)
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def make(root: Path, blocks: int) -> Path:
    """Three streams of random tokens in shards of 32 MB."""
    rng = np.random.default_rng(0)
    for name, share in STREAMS.items():
        folder = root / name / "train"
        folder.mkdir(parents=True)
        left = int(blocks * share)
        entries: list[dict[str, Any]] = []
        while left:
            count = min(left, FORM.blocks_per_shard)
            tokens = rng.integers(0, 50_000, (count, BLOCK_LEN), np.uint16)
            entries.append(write_shard(FORM, folder, f"shard.{len(entries):05d}", tokens, None))
            left -= count
        (folder / "index.json").write_bytes(index_bytes(entries))
    return root


def plan(steps: int) -> Plan:
    return build_plan([Phase("p", steps, STREAMS, BATCH)], [Stage(0, BLOCK_LEN)], "sequences", BLOCK_LEN)


def throughput(root: Path, cache: Path, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Blocks of each loader a second, and a second of CPU time (which others on the machine disturb less).

    After its first batches, the best of the rounds.
    """
    found: dict[str, dict[str, int]] = {"second": {}, "cpu_second": {}}
    for _ in range(args.rounds):
        for name, make_batches in loaders(root, cache, args.workers):
            for kind, speed in zip(found, measure(make_batches(), args.seconds), strict=True):
                found[kind][name] = max(found[kind].get(name, 0), speed)
    return found


def loaders(root: Path, cache: Path, counts: list[int]) -> list[tuple[str, Callable[[], Iterable[Any]]]]:
    """Each contender's name, and what makes its batches."""
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    from chimera.train.data.mixture import MixtureDataset
    from chimera.train.run.curriculum import MixtureLoader

    def mixture(workers: int) -> Iterable[Any]:
        data = MixtureDataset(root=str(root), cache=str(cache), plan=plan(10**7), seed=17)
        return MixtureLoader(data, num_workers=workers)

    def plain(workers: int) -> Iterable[Any]:
        streams = [Stream(local=str(root / name / "train"), proportion=float(share)) for name, share in STREAMS.items()]
        clean_stale_shared_memory()
        data = StreamingDataset(streams=streams, batch_size=BATCH, shuffle=True, shuffle_seed=17)
        return StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)

    contenders: list[tuple[str, Callable[[], Iterable[Any]]]] = [("bare memory map", partial(memory_map, root))]
    for workers in counts:
        contenders.append((f"mixture, {workers} workers", partial(mixture, workers)))
        contenders.append((f"streaming, {workers} workers", partial(plain, workers)))
    return contenders


def measure(batches: Iterable[Any], seconds: float, warm: int = 20) -> tuple[int, int]:
    """Blocks of `{"tokens": [blocks, block_len]}` a second and a CPU second, over at most `seconds`."""
    cpu = cpu_seconds()
    iterator = iter(batches)
    warmed = sum(len(batch["tokens"]) for batch in islice(iterator, warm))
    count, start = 0, time.perf_counter()
    for batch in iterator:
        count += len(batch["tokens"])
        if (took := time.perf_counter() - start) > seconds:
            break
    del iterator, batches
    gc.collect()  # workers end, and their CPU time is known
    return round(count / took), round((count + warmed) / (cpu_seconds() - cpu))


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def memory_map(root: Path) -> Iterator[dict[str, np.ndarray]]:
    """Batches of random blocks copied out of memory maps, with nothing else done."""
    rng = np.random.default_rng(0)
    maps = []
    for path in sorted(root.glob("*/train/*.mds")):
        head = np.fromfile(path, np.uint32, 2)
        maps.append(np.memmap(path, np.uint16, "r", int(head[1]), (int(head[0]), BLOCK_LEN)))
    while True:
        shard = maps[rng.integers(len(maps))]
        yield {"tokens": shard[rng.integers(0, len(shard), BATCH)]}


def far_shards(root: Path) -> Path:
    """Three streams of 10⁷ blocks, as sparse files: their heads are written, their records are holes."""
    count = FORM.blocks_per_shard
    config = json.dumps(FORM.config, sort_keys=True).encode()
    for name in STREAMS:
        folder = root / name / "train"
        folder.mkdir(parents=True)
        entries = []
        for number in range(-(-(10**7) // count)):
            offsets = 4 + 4 * (count + 1) + len(config) + np.arange(count + 1, dtype=np.int64) * 2 * BLOCK_LEN
            path = folder / f"shard.{number:05d}.mds"
            with path.open("wb") as file:
                file.write(np.uint32(count).tobytes() + offsets.astype("<u4").tobytes() + config)
                file.truncate(int(offsets[-1]))
            raw = {"basename": path.name, "bytes": int(offsets[-1]), "hashes": {}}
            entries.append({"samples": count, "raw_data": raw, "zip_data": None, **FORM.config})
        (folder / "index.json").write_bytes(index_bytes(entries))
    return root


def far_out(root: Path, cache: Path, starts: int) -> dict[str, dict[str, float]]:
    """Medians of the first batch at step 0 and at step 10⁸, in turn, each in a process of its own."""
    seen: dict[int, list[dict[str, float]]] = {0: [], 10**8: []}
    for _ in range(starts):
        for step, all_seen in seen.items():
            all_seen.append(apart(first_batch, root, cache, step))
    return {str(step): {key: median(one[key] for one in ones) for key in ones[0]} for step, ones in seen.items()}


def first_batch(root: Path, cache: Path, step: int) -> dict[str, float]:
    """Seconds and MB of memory to the batch of `step` in a plan of 10⁹ steps: dataset, state and first batch."""
    from chimera.train.data.mixture import MixtureDataset

    # what any dataset of this process pays once: imports done, allocators warm
    next(iter(MixtureDataset(root=str(root), cache=str(cache), plan=plan(10), seed=1)))
    before, start = memory("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    steps = plan(10**9)
    data = MixtureDataset(root=str(root), cache=str(cache), plan=steps, seed=17)
    data.load_state_dict(data.state_dict(steps.sequences_before(step), True))
    record = next(iter(data))
    took = time.perf_counter() - start
    assert record["step"] == step
    return {"seconds": round(took, 3), "peak_more_MB": round(memory("VmHWM") - before, 1)}


def memory(field: str) -> float:
    """A field of this process's status, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


if __name__ == "__main__":
    main()
