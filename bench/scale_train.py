"""What a run does with its shards, ranks, lanes and streams, beside training: for `scale.py`."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from chimera.mds import ShardFormat, write_shard
from chimera.train.order.schedule import Phase, Plan, Stage, build_plan

Measured = Callable[[str], AbstractContextManager[dict[str, Any]]]
BLOCK_LEN = 1024
FORM = ShardFormat(BLOCK_LEN, "uint16", False, "zstd:3", "xxh3_64", 32 << 20)
SHARES = {"en": Fraction(55, 100), "it": Fraction(35, 100), "chat": Fraction(10, 100)}


def index(count: int, folder: Path, measured: Measured) -> None:
    """Many shards in the index of one stream: read, planned with, started from nothing and from far out."""
    from chimera.commands.plan import describe
    from chimera.config import validated
    from chimera.train.data.index import read_index
    from chimera.train.data.mixture import MixtureDataset
    from chimera.train.data.roots import plan_with_shards
    from chimera.train.settings import TrainSettings

    root = shards(folder / "shards", {"s": count})
    cache, steps = str(folder / "cache"), 10**6
    settings: Any = validated(
        TrainSettings,
        {
            "shards": str(root),
            "cache": cache,
            "global_train_batch_size": 4096,
            "phases": [{"name": "p", "steps": steps, "proportions": {"s": 1}}],
            "curriculum": {"stages": [{"from_step": 0, "seq_len": BLOCK_LEN}]},
        },
        "settings",
    )
    with measured("nothing yet: imports alone"):
        pass
    with measured("index read, by each rank") as figures:
        read_index(str(root), "s", cache)
        figures["index.json MB"] = round((root / "s/train/index.json").stat().st_size / 1e6, 1)
    with measured("planned with (plan.py)"):
        plan, indexes = plan_with_shards(settings)
        describe(plan, indexes)
        del indexes
    with measured("opened"):
        data = MixtureDataset(root=str(root), cache=cache, plan=plan, seed=17)
    with measured("first batch of a run"):
        next(iter(data))
    with measured("state saved and resumed from, and its batch") as figures:
        state = data.state_dict(plan.sequences_before(steps // 2), True)
        data.load_state_dict(state)
        figures["step"] = next(iter(data))["step"]


def ranks(count: int, folder: Path, measured: Measured) -> None:
    """Many ranks, 64 lanes: what one of them computes and reads; all of them together take each block once."""
    root = shards(folder / "shards", dict.fromkeys(SHARES, 20 * count))
    sequences = 64 * count // np.gcd(64, count)
    plan = plan_of(SHARES, int(sequences), 64)
    with measured("opened, by each rank") as figures:
        data = [dataset(root, folder, plan, rank, count) for rank in sorted({0, count // 2, count - 1})]
        figures["blocks a step"] = int(sequences)
        figures["ranks opened"] = len(data)
    one, far = data[1], plan.steps // 2
    with measured("its first batch, far out") as figures:
        one.load_state_dict(one.state_dict(plan.sequences_before(far), True))
        batches = iter(one)
        first = next(batches)
        figures["blocks"] = len(first["block"])
    with measured("a thousand steps more"):
        for _ in range(1000):
            next(batches)
    with measured("the slices of all ranks"):
        steps = one.order.steps(far, far + 1)
        seen = []
        for rank in range(count):
            one.rank = rank
            start, end, _, _ = one._slice(plan.segment(far))
            seen += list(zip(steps.streams[0, start:end].tolist(), steps.blocks[0, start:end].tolist(), strict=True))
        assert len(set(seen)) == len(seen) == sequences
    assert first["step"] == far


def lanes(count: int, folder: Path, measured: Measured) -> None:
    """A rank for each of many lanes, beside one rank and lane; shards of full size, so mapped files count."""
    from chimera.train.data.cache import smallest_cache

    root = shards(folder / "shards", dict.fromkeys(SHARES, 20_000 * count // 64), FORM.blocks_per_shard)
    for number in (1, count):
        plan = plan_of(SHARES, 20 * count, number)
        name = f"lanes: {number}"
        with measured(f"{name}: opened") as figures:
            data = dataset(root, folder, plan, 0, number)
            # of a machine that reads all lanes, and of one of many
            for what, mine in (("of all lanes", number), ("of one lane", 1)):
                figures[f"smallest cache {what} GB"] = round(smallest_cache(data.indexes.values(), mine) / 1e9, 2)
        with measured(f"{name}: order of a step far out"):
            data.order.steps(plan.steps // 2, plan.steps // 2 + 1)
        with measured(f"{name}: first batch"):
            batches = iter(data)
            next(batches)
        with measured(f"{name}: a hundred steps more"):
            for _ in range(100):
                next(batches)


def streams(count: int, folder: Path, measured: Measured) -> None:
    """Many streams in one mixture, of three shards each; every shard in use is an open file."""
    from chimera.train.data.roots import allow_open_files

    allow_open_files()
    names = [f"s{number:06d}" for number in range(count)]
    root = shards(folder / "shards", dict.fromkeys(names, 3))
    with measured("planned"):
        plan = plan_of(dict.fromkeys(names, Fraction(1, count)), 1024, 1)
        plan.blocks_before(plan.steps)
    with measured("opened"):
        data = dataset(root, folder, plan, 0, 1)
    with measured("first batch"):
        batches = iter(data)
        next(batches)
    with measured("ten steps more"):
        for _ in range(10):
            next(batches)
    with measured("state") as figures:
        state = data.state_dict(plan.sequences_before(plan.steps // 2), True)
        figures["streams"] = len(state["fingerprints"])


def plan_of(shares: dict[str, Fraction], sequences: int, lanes: int) -> Plan:
    return build_plan([Phase("p", 10**6, shares, sequences)], [Stage(0, BLOCK_LEN)], "sequences", BLOCK_LEN, lanes)


def dataset(root: Path, folder: Path, plan: Plan, rank: int, world_size: int) -> Any:
    from chimera.train.data.mixture import MixtureDataset

    cache = str(folder / "cache")
    return MixtureDataset(root=str(root), cache=cache, plan=plan, seed=17, rank=rank, world_size=world_size)


def shards(root: Path, counts: dict[str, int], blocks: int = 64) -> Path:
    """Streams whose indexes name one and the same shard again and again; most are small, for mapped files count."""
    import chimera.train.data.mixture  # noqa: F401  (imported before anything is measured)

    tokens = np.zeros((blocks, BLOCK_LEN), np.uint16)
    for name, count in counts.items():
        folder = root / name / "train"
        folder.mkdir(parents=True)
        entry = write_shard(FORM, folder, "shard.000000.00000", tokens, None)
        text = json.dumps(entry, sort_keys=True).encode()
        with (folder / "index.json").open("wb") as file:  # as `index_bytes` writes it
            file.write(b'{"shards": [' + text)
            for _ in range(count - 1):
                file.write(b", " + text)
            file.write(b'], "version": 2}')
    return root
