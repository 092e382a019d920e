"""The other ways that `convert.py` measures, each run in a process of its own, by a Python that has what it needs.

What is imported before the clock starts is not counted. Nothing here imports Chimera but `_copying`.
"""

import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BLOCK_LEN = 1024
CORES = len(os.sched_getaffinity(0))
SHARD_BLOCKS = (32 << 20) // (2 * BLOCK_LEN)
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


def cpu_seconds(of: str = "all") -> float:
    """Of this process, its threads and its ended children; or of these `children` alone."""
    whose = [resource.RUSAGE_CHILDREN, *([resource.RUSAGE_SELF] if of == "all" else [])]
    return sum(sum(resource.getrusage(who)[:2]) for who in whose)


def child(python: str, function: str, tokenizer: Vocabulary, out: Path, files: list[str]) -> Spent:
    """Run a function of this file in a process of its own; the wall and CPU seconds it says it took."""
    code = (
        f"import sys; sys.path.insert(0, sys.argv.pop(1)); from bench.convert_ways import {function} as f; "
        "spent = f(*sys.argv[1:]); print('\\nspent', *spent)"
    )
    command = [python, "-c", code, str(ROOT), json.dumps(asdict(tokenizer)), str(out), *files]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if function == "_encode_alone" else "false"}
    said = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    _, wall, cpu = said.stdout.decode().splitlines()[-1].split()
    return float(wall), float(cpu)


def _encode_alone(described: str, out: str, *files: str) -> Spent:
    """Only the encoding calls, in batches of 1 000 texts; reading and what is done with the ids is not counted."""
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


def _usual(described: str, out: str, *files: str) -> Spent:
    """The pattern of today's conversion scripts; its long imports are not counted."""
    from datasets import load_dataset
    from streaming import MDSWriter
    from torch.utils.data import DataLoader, IterableDataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = Vocabulary(**json.loads(described))
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


def _copying(described: str, out: str, blocks: str, *files: str) -> Spent:
    """Reading and writing alone: every text as bytes, then the builder's own blocks (`blocks`, .npy) as shards."""
    import pyarrow.parquet  # noqa: F401 (before the clock starts, for the processes forked below)

    import chimera.mds  # noqa: F401 (as above)

    Path(out).mkdir()
    began, cpu = time.perf_counter(), cpu_seconds()
    with ProcessPoolExecutor(CORES) as pool:
        shares = [(described, out, blocks, file, i, len(files)) for i, file in enumerate(files)]
        list(pool.map(_copy, shares))
    return time.perf_counter() - began, cpu_seconds() - cpu


def _copy(share: tuple[str, str, str, str, int, int]) -> int:
    import pyarrow.parquet as pq

    from chimera.mds import ShardFormat, write_shard

    described, out, blocks, file, number, count = share
    size = 0
    for batch in pq.ParquetFile(file).iter_batches(256, columns=["text"], use_threads=False):
        size += sum(map(len, batch.column(0).cast("binary").to_pylist()))
    tokens = np.load(blocks, mmap_mode="r")
    mine = tokens[len(tokens) * number // count : len(tokens) * (number + 1) // count]
    name = np.dtype(Vocabulary(**json.loads(described)).dtype).name
    form = ShardFormat(BLOCK_LEN, name, False, "zstd:3", "xxh3_64", 32 << 20)
    for at in range(0, len(mine), SHARD_BLOCKS):
        write_shard(form, Path(out), f"{number:05d}.{at:08d}", mine[at : at + SHARD_BLOCKS], None)
    return size


def _datatrove(described: str, out: str, *files: str) -> Spent:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = Vocabulary(**json.loads(described))
    folder = str(Path(files[0]).parent)
    began, cpu = time.perf_counter(), cpu_seconds()
    steps = [
        ParquetReader(folder, glob_pattern="text*.parquet"),
        DocumentTokenizer(out, tokenizer.file, eos_token=tokenizer.eos, shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=len(files), workers=CORES, logging_dir=f"{out}-logs", start_method="fork").run()
    spent = time.perf_counter() - began, cpu_seconds() - cpu
    np.save(
        f"{out}.npy", sum(path.stat().st_size for path in Path(out).glob("*.ds")) // np.dtype(tokenizer.dtype).itemsize
    )
    return spent


def _litdata(described: str, out: str, *files: str) -> Spent:
    import pyarrow.parquet as pq
    import torch
    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader
    from tokenizers import Tokenizer

    tokenizer = Vocabulary(**json.loads(described))
    loaded: list[Any] = []

    def tokenize(file: str) -> Iterator[Any]:
        loaded[:] = loaded or [Tokenizer.from_file(tokenizer.file)]
        for batch in pq.ParquetFile(file).iter_batches(1000, columns=["text"]):
            for text in batch.column(0).to_pylist():
                ids = loaded[0].encode(text, add_special_tokens=False).ids
                yield torch.tensor([*ids, tokenizer.eos_id], dtype=torch.int32)

    began, cpu = time.perf_counter(), cpu_seconds()
    item_loader = TokensLoader(BLOCK_LEN)
    sizes = {"chunk_bytes": "64MB", "num_workers": CORES}
    optimize(tokenize, list(files), out, item_loader=item_loader, start_method="fork", verbose=False, **sizes)
    spent = time.perf_counter() - began, cpu_seconds() - cpu
    np.save(f"{out}.npy", sum(chunk["dim"] for chunk in json.loads((Path(out) / "index.json").read_text())["chunks"]))
    return spent


def has(python: str, module: str) -> bool:
    """Whether a Python has a module, without importing it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], check=False).returncode == 0
    except OSError:
        return False
