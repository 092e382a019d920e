"""Token shards made by others with streaming's own MDSWriter, as llm-foundry's conversion leaves them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from chimera.cli import UserError
from tests.train.make_shards import plan_for
from train.foreign import open_foreign
from train.mixture import MixtureDataset

LENGTH = 16
PLAN = plan_for([(3, {"web": 1})], {0: 4}, batch=16)  # four blocks a step


def tokens(block: int) -> np.ndarray:
    return np.arange(LENGTH) + 1000 * block


def write(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any) -> None:
    with MDSWriter(out=str(folder), columns=columns, size_limit=2000, **options) as out:
        for sample in samples:
            out.write(sample)


def read(root: Path, tmp_path: Path) -> dict[int, list[int]]:
    """All blocks as a run over the stream sees them."""
    data = MixtureDataset(root=str(root), cache=str(tmp_path / "cache"), plan=PLAN, seed=1)
    found: dict[int, list[int]] = {}
    for record in data:
        found.update(zip(record["block"].tolist(), record["tokens"].tolist(), strict=True))
    return found


EXPECTED = {block: tokens(block).tolist() for block in range(12)}


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd:1"}, {"compression": "gz", "hashes": ["sha1", "xxh64"]}])
@pytest.mark.parametrize(
    ("encoding", "store"),
    [
        ("bytes", lambda block: tokens(block).astype(np.int64).tobytes()),
        ("ndarray:int32", lambda block: tokens(block).astype(np.int32)),
        ("ndarray:uint16:16", lambda block: tokens(block).astype(np.uint16)),
    ],
)
def test_blocks_of_one_length_are_read_whatever_their_encoding(
    tmp_path: Path, split: str, options: dict[str, Any], encoding: str, store: Any
) -> None:
    write(tmp_path / "web" / split, {"tokens": encoding}, [{"tokens": store(b)} for b in range(12)], **options)
    assert read(tmp_path, tmp_path) == EXPECTED


def test_columns_beside_the_tokens_are_passed_over(tmp_path: Path) -> None:
    samples = [{"tokens": tokens(b).astype(np.int32), "id": b, "source": "abcd", "z": b"xy"} for b in range(12)]
    write(tmp_path / "web", {"tokens": "ndarray:int32", "id": "int", "source": "str", "z": "bytes"}, samples)
    assert read(tmp_path, tmp_path) == EXPECTED


def refused(tmp_path: Path, columns: dict[str, str], samples: list[dict[str, Any]], message: str) -> None:
    write(tmp_path / "web", columns, samples)
    with pytest.raises(UserError, match=message):
        read(tmp_path, tmp_path)


def test_records_of_different_lengths_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": tokens(b)[: LENGTH - b % 2].tobytes()} for b in range(12)]
    refused(tmp_path, {"tokens": "bytes"}, samples, r"shard \S+/web/shard.00000.mds: its records differ in length")


def test_records_that_differ_in_shape_but_not_in_length_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": bytes(8 * (4 + b % 2)), "id": bytes(8 * (4 - b % 2))} for b in range(12)]
    refused(tmp_path, {"tokens": "bytes", "id": "bytes"}, samples, "its records differ in shape")


def test_blocks_of_another_length_than_the_plans_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": np.zeros(24, np.int64).tobytes()} for _ in range(12)]
    refused(tmp_path, {"tokens": "bytes"}, samples, "holds blocks of 24 tokens, 16 are expected")


@pytest.mark.parametrize(
    ("columns", "sample", "message"),
    [
        ({"text": "str"}, {"text": "abc"}, r"has no column `tokens` \(it has text\)"),
        ({"tokens": "str"}, {"tokens": "abc"}, "column `tokens` is stored as `str`; readable are"),
        ({"tokens": "pkl"}, {"tokens": [1, 2]}, "column `tokens` is stored as `pkl`; readable are"),
    ],
)
def test_what_holds_no_tokens_is_refused(
    tmp_path: Path, columns: dict[str, str], sample: dict[str, Any], message: str
) -> None:
    refused(tmp_path, columns, [sample] * 12, message)


def test_shards_of_ours_without_their_manifest_are_not_taken_for_such(demo_shards: Path, tmp_path: Path) -> None:
    """A build that is not finished, or a copy of one: nothing would say which token is padding."""
    shutil.copytree(demo_shards, tmp_path / "shards")
    shutil.copytree(demo_shards.parent / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "shards/manifest.json").unlink()
    with pytest.raises(UserError, match=r"their manifest\.json is missing: .* finish the build"):
        open_foreign(f"{tmp_path}/shards", f"{tmp_path}/cache", f"{tmp_path}/tokenizer", ["it_culturax"])


def test_a_run_trains_on_them_with_the_tokenizer_the_config_names(demo_shards: Path, tmp_path: Path) -> None:
    """As someone does who comes from llm-foundry: MDS folders, a tokenizer folder, no manifest."""
    import json

    from tests.train.conftest import ROOT, SMALL, steps_of
    from train.main import main

    for name in ("one", "two"):
        samples = [{"tokens": np.random.default_rng(b).integers(4, 3000, 128).astype(np.int32)} for b in range(20)]
        write(tmp_path / "old" / name, {"tokens": "ndarray:int32"}, samples)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes((demo_shards / "tokenizer/tokenizer.json").read_bytes())
    config = [
        *(str(ROOT / "yamls/demo/base.yaml"), *SMALL),
        f"shards={tmp_path}/old",
        f"cache={tmp_path}/cache",
        f"save_folder={tmp_path}/run",
        "phases=[{name: all, steps: 6, proportions: {one: 0.5, two: 0.5}}]",
        "scheduler.decay_steps=2",
    ]
    with pytest.raises(UserError, match="no shards at"):
        main(config)
    config.append(f"tokenizer={tmp_path}/tokenizer")
    with pytest.raises(UserError, match="names no eos_token"):
        main(config)
    (tmp_path / "tokenizer/special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert main(config) == 0
    assert [line["streams"] for line in steps_of(tmp_path / "run")][:2] == [{"one": 256, "two": 256}] * 2
