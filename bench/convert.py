"""The builder end to end against its tokenizer alone and against the usual way, on the same text in one run.

`python bench/convert.py [--data GLOB ...] [--tokenizer PATH] [--eos TOKEN] [--pad TOKEN] [--megabytes N] [--rounds N]
[--json FILE]`

    builder   convert/build_shards.py: parquet in, compressed and hashed MDS shards and manifest out
    (a)       `tokenizers.encode_batch_fast` on all cores, text already in memory, nothing written
    (b)       `datasets` streaming, one `tokenizer(text)` call a document in DataLoader workers, MDSWriter

Each way's tokens are compared with the others' outside of its time. Compare ratios within a run, each way at the best
of the rounds. All three keep every core busy, so on a machine with other work the CPU seconds are the fairer measure.
"""

import argparse
import glob
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # so imports of the project come after it

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
BLOCK_LEN = 1024
FILES = 8
CORES = len(os.sched_getaffinity(0))
Spent = tuple[float, float]  # wall seconds, CPU seconds


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer all ways share."""

    file: str
    eos: str
    pad: str
    eos_id: int
    pad_id: int
    size: int

    @property
    def dtype(self) -> str:
        """What the builder stores ids as."""
        return "<u2" if self.size <= 1 << 16 else "<u4"


def vocabulary(file: str, eos: str, pad: str) -> Vocabulary:
    from chimera.convert.encode.encoding import Encoder
    from chimera.convert.settings import TokenizerSettings

    found = Encoder.from_settings(TokenizerSettings(path=file, eos_token=eos, pad_token=pad))
    return Vocabulary(file, eos, pad, found.eos_id, found.fill_id, found.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[str(SHARED / "*" / "*.parquet")], help="parquet with `text`")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizer"))
    parser.add_argument("--eos", default="<|endoftext|>", help="the token that ends documents")
    parser.add_argument("--pad", default="<|padding|>", help="the token that fills blocks")
    parser.add_argument("--megabytes", type=int, default=200, help="the data is repeated until it is this large")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = Path(args.tokenizer)
    tokenizer = vocabulary(str(path / "tokenizer.json" if path.is_dir() else path), args.eos, args.pad)
    with tempfile.TemporaryDirectory() as folder:
        files, size = prepare(args.data, args.megabytes * 10**6, Path(folder))
        ways: dict[str, Callable[[list[str], Vocabulary, Path], tuple[Spent, np.ndarray]]] = {
            "builder": builder,
            "encode_batch_fast": encode_batch_fast,
            "usual": usual,
        }
        runs: dict[str, list[Spent]] = {name: [] for name in ways}
        counts: dict[str, np.ndarray] = {}
        for turn in range(args.rounds):
            for name, way in ways.items():
                spent, counts[name] = way(files, tokenizer, Path(folder, f"{name}{turn}"))
                runs[name].append(spent)
                print(f"round {turn}: {name}: {spent[0]:.1f} s, {spent[1]:.1f} CPU s", file=sys.stderr)
    wall, cpu = ({name: min(column) for name, column in columns(runs, i).items()} for i in (0, 1))
    found = {
        "cores": CORES,
        "load": os.getloadavg()[0],
        "megabytes": round(size / 1e6, 1),
        "megabytes_per_second": {name: round(size / 1e6 / seconds, 1) for name, seconds in wall.items()},
        "megabytes_per_cpu_second": {name: round(size / 1e6 / seconds, 1) for name, seconds in cpu.items()},
        "builder_is_faster": {name: round(wall[name] / wall["builder"], 1) for name in wall},
        "builder_is_faster_per_cpu_second": {name: round(cpu[name] / cpu["builder"], 1) for name in cpu},
        "tokens": int(counts["builder"].sum()),
        "same_ids": all(np.array_equal(count, counts["builder"]) for count in counts.values()),
    }
    for name, count in counts.items():
        if len(other := np.flatnonzero(count != counts["builder"])):
            pairs = [f"{id_}: {count[id_]}, builder {counts['builder'][id_]}" for id_ in other[:5]]
            print(f"{name} has other counts of {len(other)} ids: {'; '.join(pairs)}", file=sys.stderr)
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def columns(runs: dict[str, list[Spent]], i: int) -> dict[str, list[float]]:
    return {name: [spent[i] for spent in all_spent] for name, all_spent in runs.items()}


def cpu_seconds() -> float:
    """Of this process, its threads and its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def prepare(patterns: list[str], size: int, folder: Path) -> tuple[list[str], int]:
    """`FILES` parquet files of at least `size` bytes of text together; the files and the exact size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sources = sorted(file for pattern in patterns for file in glob.glob(pattern))
    texts = [t for file in sources for t in pq.read_table(file, columns=["text"])["text"].to_pylist() if t]
    texts = [text for text in texts if len(text) >= 50]
    once = sum(len(text.encode()) for text in texts)
    times = -(-size // once)
    texts = texts * times
    files = []
    for i in range(FILES):
        share = texts[len(texts) * i // FILES : len(texts) * (i + 1) // FILES]
        file = str(folder / f"text{i}.parquet")
        pq.write_table(pa.table({"text": share}), file, row_group_size=1000, compression="zstd")
        files.append(file)
    return files, once * times


def builder(files: list[str], tokenizer: Vocabulary, out: Path) -> tuple[Spent, np.ndarray]:
    """Our builder as a user runs it, its start included."""
    config = {
        "output": str(out),
        "tokenizer": {"path": tokenizer.file, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad},
        "block_len": BLOCK_LEN,
        "eval_fraction": 0.0,
        "streams": {"text": {"min_tokens": 0, "sources": [{"files": files}]}},
    }
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "convert" / "build_shards.py"), str(file)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as most have it
    began, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=ROOT, env=kept)
    spent = time.perf_counter() - began, cpu_seconds() - cpu
    return spent, histogram(out / "text" / "train", tokenizer.dtype, tokenizer)


def encode_batch_fast(files: list[str], tokenizer: Vocabulary, out: Path) -> tuple[Spent, np.ndarray]:
    """Only the encoding calls, in batches of 1 000 texts; reading and what is done with the ids is not counted."""
    return child("_encode_alone", tokenizer, out, files), np.load(f"{out}.npy")


def child(function: str, tokenizer: Vocabulary, out: Path, files: list[str]) -> Spent:
    """Run a function of this file in a process of its own; the wall and CPU seconds it says it took."""
    code = f"import sys; sys.path[0] = sys.argv[1]; from bench.convert import {function} as f; print(*f(*sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(ROOT), json.dumps(asdict(tokenizer)), str(out), *files]
    wall, cpu = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout.split()
    return float(wall), float(cpu)


def _encode_alone(described: str, out: str, *files: str) -> Spent:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    tokenizer = Vocabulary(**json.loads(described))
    loaded = Tokenizer.from_file(tokenizer.file)
    wall, cpu, counts = 0.0, 0.0, np.zeros(tokenizer.size, np.int64)
    for file in files:
        texts = pq.read_table(file)["text"].to_pylist()
        for start in range(0, len(texts), 1000):
            began, cpu_began = time.perf_counter(), cpu_seconds()
            batch = loaded.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
            wall, cpu = wall + time.perf_counter() - began, cpu + cpu_seconds() - cpu_began
            for encoding in batch:
                counts += np.bincount([*encoding.ids, tokenizer.eos_id], minlength=tokenizer.size)
    np.save(f"{out}.npy", counts)
    return wall, cpu


def usual(files: list[str], tokenizer: Vocabulary, out: Path) -> tuple[Spent, np.ndarray]:
    """The pattern of today's conversion scripts; its long imports are not counted."""
    return child("_usual", tokenizer, out, files), histogram(out, "<i4", tokenizer)


def _usual(described: str, out: str, *files: str) -> Spent:
    from datasets import load_dataset
    from streaming import MDSWriter
    from torch.utils.data import DataLoader, IterableDataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = Vocabulary(**json.loads(described))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began, cpu = time.perf_counter(), cpu_seconds()
    rows = load_dataset("parquet", data_files=list(files), split="train", streaming=True)

    class Concatenated(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            loaded = PreTrainedTokenizerFast(tokenizer_file=tokenizer.file, model_max_length=10**9)
            buffer: list[int] = []
            for row in rows:  # `datasets` gives each worker its share of the files
                buffer += [*loaded(row["text"], truncation=False, padding=False)["input_ids"], tokenizer.eos_id]
                while len(buffer) >= BLOCK_LEN:
                    yield {"tokens": np.array(buffer[:BLOCK_LEN], np.int32)}
                    buffer = buffer[BLOCK_LEN:]
            if buffer:
                yield {"tokens": np.array(buffer + [tokenizer.pad_id] * (BLOCK_LEN - len(buffer)), np.int32)}

    loader = DataLoader(Concatenated(), batch_size=512, num_workers=CORES, prefetch_factor=2, collate_fn=list)
    columns = {"tokens": f"ndarray:int32:{BLOCK_LEN}"}
    with MDSWriter(out=out, columns=columns, compression="zstd", hashes=["xxh3_64"]) as writer:
        for batch in loader:
            for sample in batch:
                writer.write(sample)
    return time.perf_counter() - began, cpu_seconds() - cpu


def histogram(folder: Path, dtype: str, tokenizer: Vocabulary) -> np.ndarray:
    """How often each id occurs in the MDS shards of a folder, without padding."""
    import zstandard

    size = BLOCK_LEN * np.dtype(dtype).itemsize
    counts = np.zeros(tokenizer.size, np.int64)
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        packed = (folder / shard["zip_data"]["basename"]).read_bytes()
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=shard["raw_data"]["bytes"])
        counts += np.bincount(np.frombuffer(raw[-shard["samples"] * size :], dtype), minlength=tokenizer.size)
    counts[tokenizer.pad_id] = 0
    return counts


if __name__ == "__main__":
    main()
