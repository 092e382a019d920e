"""The bytes of shards, against streaming's own writer and reader."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from convert.shards import Json, ShardFormat, file_of, index_bytes, move_file, write_file, write_shard


def blocks(form: ShardFormat, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, np.iinfo(form.dtype).max, (count, form.block_len), dtype=form.dtype)
    return tokens, rng.random((count, form.block_len)) < 0.5 if form.masked else None


@pytest.mark.parametrize("form", [
    ShardFormat(64, "uint16", masked=False, compression=None, hash="xxh3_64", shard_bytes=5000),
    ShardFormat(64, "uint16", masked=True, compression="zstd:3", hash="sha256", shard_bytes=5000),
    ShardFormat(16, "uint32", masked=True, compression="zstd", hash="xxh64", shard_bytes=700),
])  # fmt: skip
def test_shards_are_those_of_streamings_writer(form: ShardFormat, tmp_path: Path) -> None:
    from streaming import MDSWriter
    from streaming.base.format.mds.reader import MDSReader

    tokens, masks = blocks(form, 100)
    columns = {name: encoding for name, encoding, _ in form.columns}
    with MDSWriter(
        columns=columns,
        out=str(tmp_path / "theirs"),
        compression=form.compression,
        hashes=[form.hash],
        size_limit=form.shard_bytes,
    ) as writer:
        for i in range(len(tokens)):
            row = {"tokens": tokens[i]}
            if masks is not None:
                row["assistant"] = np.packbits(masks[i], bitorder="little")
            writer.write(row)
        theirs: list[Json] = writer.shards
    (tmp_path / "ours").mkdir()
    n = form.blocks_per_shard
    ours = [
        write_shard(
            form, tmp_path / "ours", f"shard.{i:05d}", tokens[i * n : i * n + n],
            masks[i * n : i * n + n] if masks is not None else None,
        )
        for i in range(-(-len(tokens) // n))
    ]  # fmt: skip
    assert len(ours) == len(theirs) > 2
    for mine, other in zip(ours, theirs, strict=True):
        assert {**mine, "zip_data": None} == {**other, "zip_data": None}  # raw bytes have equal hashes
        name = file_of(mine)["basename"]
        assert name == file_of(other)["basename"]
        if form.compression:
            unpacked = [zstandard.decompress((tmp_path / who / name).read_bytes()) for who in ("ours", "theirs")]
            assert unpacked[0] == unpacked[1]
    write_file(tmp_path / "ours" / "index.json", index_bytes(ours))
    reader = MDSReader.from_json(str(tmp_path / "ours"), None, theirs[0])
    if form.compression:
        raw = zstandard.decompress((tmp_path / "ours" / file_of(ours[0])["basename"]).read_bytes())
        (tmp_path / "ours" / ours[0]["raw_data"]["basename"]).write_bytes(raw)
    assert np.array_equal(reader[n - 1]["tokens"], tokens[n - 1])


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    (tmp_path / ".a.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_moved_to_another_disk_is_whole_and_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `work` on a node's own disk and the output on another: a copy lost with the power would be lost for good."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        file, place = Path(elsewhere, "made"), tmp_path / "place"
        assert os.stat(elsewhere).st_dev != tmp_path.stat().st_dev, "this test needs /dev/shm to be another file system"
        file.write_bytes(b"shard" * 1000)
        synced = []
        sync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), sync(number)))
        move_file(file, place)
        assert (place.read_bytes(), file.exists()) == (b"shard" * 1000, False)
        assert synced == [place.stat().st_ino, tmp_path.stat().st_ino]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
