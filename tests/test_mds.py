"""The bytes of shards, against streaming's own writer and reader."""

from pathlib import Path

import numpy as np
import pytest
import zstandard

from chimera.mds import Json, ShardFormat, file_of, index_bytes, write_shard


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
    (tmp_path / "ours" / "index.json").write_bytes(index_bytes(ours))
    reader = MDSReader.from_json(str(tmp_path / "ours"), None, theirs[0])
    if form.compression:
        raw = zstandard.decompress((tmp_path / "ours" / file_of(ours[0])["basename"]).read_bytes())
        (tmp_path / "ours" / ours[0]["raw_data"]["basename"]).write_bytes(raw)
    assert np.array_equal(reader[n - 1]["tokens"], tokens[n - 1])
