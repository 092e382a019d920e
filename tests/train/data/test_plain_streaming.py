"""Others read our shards too: a plain `StreamingDataset`, and a tokenizer, give back the documents."""

import json

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from tests.train.conftest import ROOT


def test_a_plain_streaming_dataset_gives_back_the_documents(demo_shards):
    from streaming import StreamingDataset

    manifest = json.loads((demo_shards / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(demo_shards / "tokenizer/tokenizer.json"))
    eos, pad = manifest["tokenizer"]["eos_id"], manifest["tokenizer"]["pad_id"]
    found: dict[str, list[str]] = {}
    for split in ("train", "eval"):
        # the shards stay as they are: what is unpacked goes to a folder of its own
        plain = StreamingDataset(
            remote=str(demo_shards / "it_culturax" / split),
            local=str(demo_shards.parent / f"plain-{split}"),
            batch_size=1,
            shuffle=False,
            validate_hash=manifest["hash"],
        )
        ids = np.concatenate([plain[i]["tokens"] for i in range(plain.num_samples)]).astype(np.int64)
        ends = np.flatnonzero(ids == eos)
        assert (ids[ends[-1] + 1 :] == pad).all()
        starts = np.concatenate([[0], ends[:-1] + 1])
        found[split] = [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]

    rows = pq.read_table(ROOT / "samples/it_pages.parquet", columns=["text"]).column("text").to_pylist()
    kept = [text for text in rows if text is not None and text in set(found["train"]) | set(found["eval"])]
    assert len(kept) == manifest["streams"]["it_culturax"]["rows"]["documents"]
    held_out = set(found["eval"])
    assert found["train"] == [text for text in kept if text not in held_out]
    assert found["eval"] == [text for text in kept if text in held_out]
