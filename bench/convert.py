"""The builder end to end, against its tokenizer alone, the usual way, its peers, and reading and writing alone.

`python bench/convert.py [--data GLOB ...] [--tokenizer PATH] [--eos TOKEN] [--pad TOKEN] [--megabytes N] [--rounds N]
[--datatrove PYTHON] [--litdata PYTHON] [--json FILE]`

    builder     convert/build_shards.py: parquet in, compressed and hashed MDS shards and manifest out
    (a)         `tokenizers.encode_batch_fast` on all cores, text already in memory, nothing written
    (b)         `datasets` streaming, one `tokenizer(text)` call a document in DataLoader workers, MDSWriter
    (c)         the same parquet read and the same ids written as shards, nothing encoded: the limit
    (d)         `datatrove`'s tokenizer pipeline, and `litdata.optimize` with a `tokenizers` call a document, each by a
                Python that has it (`--datatrove`, `--litdata`: of an environment of its own); left out where it has not
    then        the builder on text files of a document each, on conversations (ChatML), and on parquet files of a hub
                on loopback, each of a tenth of the text

The text does not repeat (`mixed_text.py`). Ids are compared with the builder's outside of the time: how often each
occurs, of (d) how many there are. Compare ratios within a run, each way at the best of the rounds. All of them keep
every core busy, so on a machine with other work the CPU seconds are the fairer measure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # so imports of the project come after it

import numpy as np

from bench.convert_ways import BLOCK_LEN, CORES, Spent, Vocabulary, child, cpu_seconds, has
from bench.mixed_text import Mixed, write_chats, write_parquet, write_texts

SHARED = ROOT.parent / "shared" / "data"
FILES = 8
CARD = b"---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[str(SHARED / "*" / "*.parquet")], help="parquet with `text`")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizer"))
    parser.add_argument("--eos", default="<|endoftext|>", help="the token that ends documents")
    parser.add_argument("--pad", default="<|padding|>", help="the token that fills blocks")
    parser.add_argument("--megabytes", type=int, default=600, help="of text that is mixed of the data's sentences")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--datatrove", default=sys.executable, metavar="PYTHON", help="one that has datatrove")
    parser.add_argument("--litdata", default=sys.executable, metavar="PYTHON", help="one that has litdata")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = Path(args.tokenizer)
    tokenizer = vocabulary(str(path / "tokenizer.json" if path.is_dir() else path), args.eos, args.pad)
    mixed = Mixed(args.data)
    with tempfile.TemporaryDirectory() as folder:
        files, size = write_parquet(mixed.documents(args.megabytes * 10**6), Path(folder), FILES)
        found = measure(args, tokenizer, files, size, Path(folder))
        found["further"] = further(mixed, tokenizer, args.megabytes * 10**5, files, Path(folder))
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def vocabulary(file: str, eos: str, pad: str) -> Vocabulary:
    from chimera.convert.encode.encoding import Encoder
    from chimera.convert.settings import TokenizerSettings

    found = Encoder.from_settings(TokenizerSettings(path=file, eos_token=eos, pad_token=pad))
    return Vocabulary(file, eos, pad, found.eos_id, found.fill_id, found.vocab_size)


def measure(
    args: argparse.Namespace, tokenizer: Vocabulary, files: list[str], size: int, folder: Path
) -> dict[str, Any]:
    """All ways on the same files, in turn."""
    pythons = dict.fromkeys(("encode_batch_fast", "usual", "copying"), sys.executable)
    for name, python in (("datatrove", args.datatrove), ("litdata", args.litdata)):
        if has(python, name):
            pythons[name] = python
        else:
            say(f"{name} is left out: {python} has it not (--{name} PYTHON names another)")
    runs: dict[str, list[Spent]] = {name: [] for name in ("builder", *pythons)}
    counts: dict[str, Any] = {}
    for turn in range(args.rounds):
        built = folder / f"builder{turn}"
        stream = {"min_tokens": 0, "sources": [{"files": files}]}
        runs["builder"].append(build(stream, tokenizer, built))
        blocks = blocks_of(built / "text" / "train", tokenizer.dtype)
        np.save(folder / "blocks.npy", blocks)
        counts["builder"] = histogram(blocks, tokenizer)
        say(f"round {turn}: builder: {shown(runs['builder'][-1])}")
        for name, python in pythons.items():
            out = folder / f"{name}{turn}"
            given = [str(folder / "blocks.npy"), *files] if name == "copying" else files
            function = "_encode_alone" if name == "encode_batch_fast" else f"_{name}"
            runs[name].append(child(python, function, tokenizer, out, given))
            say(f"round {turn}: {name}: {shown(runs[name][-1])}")
            if name == "usual":
                counts[name] = histogram(blocks_of(out, "<i4"), tokenizer)
            elif name != "copying":
                counts[name] = np.load(f"{out}.npy")
    wall, cpu = ({name: min(spent[i] for spent in spents) for name, spents in runs.items()} for i in (0, 1))
    for name, count in counts.items():
        if count.ndim and len(other := np.flatnonzero(count != counts["builder"])):
            pairs = [f"{id_}: {count[id_]}, builder {counts['builder'][id_]}" for id_ in other[:5]]
            say(f"{name} has other counts of {len(other)} ids: {'; '.join(pairs)}")
    tokens = {name: int(count.sum()) for name, count in counts.items()}
    return {
        "cores": CORES,
        "load": os.getloadavg()[0],
        "megabytes": round(size / 1e6, 1),
        "megabytes_per_second": {name: round(size / 1e6 / seconds, 1) for name, seconds in wall.items()},
        "megabytes_per_cpu_second": {name: round(size / 1e6 / seconds, 1) for name, seconds in cpu.items()},
        "builder_is_faster": {name: round(wall[name] / wall["builder"], 2) for name in wall},
        "builder_is_faster_per_cpu_second": {name: round(cpu[name] / cpu["builder"], 2) for name in cpu},
        "tokens": tokens,
        "same_ids": all(np.array_equal(count, counts["builder"]) for count in counts.values() if count.ndim),
    }


def further(mixed: Mixed, tokenizer: Vocabulary, size: int, files: list[str], folder: Path) -> dict[str, Any]:
    """The builder on other kinds of sources; of a hub the server's CPU is not counted."""
    from tests.convert.hub_server import HubServer

    texts = write_texts(mixed.documents(size, longest=4000), folder / "texts")
    chats = write_chats(mixed, size, folder / "chats.jsonl")
    few = files[: max(1, FILES // 10)]
    sources: dict[str, tuple[int, dict[str, Any]]] = {
        "text files": (texts, {"sources": [{"files": [f"{folder}/texts/*.txt"]}]}),
        "conversations": (chats, {"format": "chatml", "sources": [{"files": [f"{folder}/chats.jsonl"]}]}),
        "hub": (texts_in(few), {"sources": [{"hub": "bench/set"}]}),
    }
    found: dict[str, Any] = {}
    with HubServer({"bench/set": {"README.md": CARD, **{Path(f).name: Path(f).read_bytes() for f in few}}}) as hub:
        for name, (bytes_, stream) in sources.items():
            wall, cpu = build(
                stream, tokenizer, folder / name.replace(" ", "-"), HF_ENDPOINT=hub.url, HF_HOME=str(folder)
            )
            say(f"{name}: {shown((wall, cpu))}")
            found[name] = {
                "megabytes": round(bytes_ / 1e6, 1),
                "megabytes_per_second": round(bytes_ / 1e6 / wall, 1),
                "megabytes_per_cpu_second": round(bytes_ / 1e6 / cpu, 1),
            }
    return found


def texts_in(files: list[str]) -> int:
    """Bytes of the texts in parquet files."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return sum(pc.sum(pc.binary_length(pq.read_table(file)["text"])).as_py() for file in files)


def build(stream: dict[str, Any], tokenizer: Vocabulary, out: Path, **environment: str) -> Spent:
    """Our builder as a user runs it, its start included."""
    config = {
        "output": str(out),
        "tokenizer": {"path": tokenizer.file, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad},
        "block_len": BLOCK_LEN,
        "eval_fraction": 0.0,
        "streams": {"text": stream},
    }
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "convert" / "build_shards.py"), str(file)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as most have it
    began, cpu = time.perf_counter(), cpu_seconds("children")
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=ROOT, env={**kept, **environment})
    return time.perf_counter() - began, cpu_seconds("children") - cpu


def blocks_of(folder: Path, dtype: str) -> np.ndarray:
    """The blocks in the MDS shards of a folder: [blocks, BLOCK_LEN]."""
    import zstandard

    size = BLOCK_LEN * np.dtype(dtype).itemsize
    found = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        packed = (folder / shard["zip_data"]["basename"]).read_bytes()
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=shard["raw_data"]["bytes"])
        found.append(np.frombuffer(raw[-shard["samples"] * size :], dtype).reshape(-1, BLOCK_LEN))
    return np.concatenate(found)


def histogram(blocks: np.ndarray, tokenizer: Vocabulary) -> np.ndarray:
    """How often each id occurs, without padding."""
    counts = np.zeros(tokenizer.size, np.int64)
    for some in np.array_split(blocks, 64):
        counts += np.bincount(some.ravel(), minlength=tokenizer.size)
    counts[tokenizer.pad_id] = 0
    return counts


def shown(spent: Spent) -> str:
    return f"{spent[0]:.1f} s, {spent[1]:.1f} CPU s"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
