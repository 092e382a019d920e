"""Runs of the real trainer for `bench/gpu.py`: shards and tokenizer made here, each run a process of its own."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

from chimera import manifest
from chimera.manifest import Manifest, Stream
from chimera.mds import ShardFormat, index_bytes, write_shard

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (256, 512, 1024)
BLOCK_LEN = LENGTHS[-1]
STREAMS = {"lessons": 0.6, "pages": 0.4}
Json = dict[str, Any]


class Failed(Exception):
    """A check has found a claim untrue; the message says it in one line."""


class Skipped(Exception):
    """A check cannot be done here; the message names what is missing."""


@dataclass(frozen=True)
class Sizes:
    """How large the runs are."""

    vocabulary: int  # of the tokenizer
    small: Json  # the model of the checks
    recipe: Json
    large: Json
    steps: int  # of each sequence length
    warm_up: int  # steps of each length whose time does not count
    sequences: int  # a step; a device takes as many at once
    large_sequences: int
    large_tokens: int  # that a device takes at once
    auto_sequences: int  # of 1 024 tokens: more than fit


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    folder: Path
    steps: list[Json]  # steps.jsonl
    metrics: list[Json]  # metrics.jsonl
    measured: Json  # of bench/timed_run.py; empty for a killed run

    def seconds(self, seq_len: int, warm_up: int) -> float:
        """Median of the steps of one length, the first ones and the run's last left out."""
        steps = [step["step"] for step in self.steps if step["seq_len"] == seq_len][warm_up:]
        return median(self.measured["seconds"][step] for step in steps if step in self.measured["seconds"])

    def wait_share(self, warm_up: int) -> float:
        """Mean share of a step that waits for data."""
        return mean(line["data/wait_share"] for line in self.metrics[warm_up:] if "data/wait_share" in line)

    def last(self, name: str) -> float | None:
        """The last value logged of a metric."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)


class Runs:
    """Trains in processes of their own, below one folder.

    Args:
        folder: for shards, configs, save folders and logs.
        device: what `bench/device.py` says.
    """

    def __init__(self, folder: Path, sizes: Sizes, device: Json) -> None:
        self.folder, self.sizes, self.device = folder, sizes, device
        self.on_gpu = bool(device["on_gpu"])
        self.limit: float | None = None  # minutes, instead of each check's own
        self.until = float("inf")  # time.monotonic() at which the check in hand has to end

    def train(
        self,
        name: str,
        model: Json,
        *overrides: str,
        lengths: tuple[int, ...] = LENGTHS,
        steps: int | None = None,
        sequences: int | None = None,
        microbatch_tokens: int | str | None = None,
        kill_after: int | None = None,
    ) -> Trained:
        """Train `model`; raises `Failed` with the last line it printed where it does not end as it should."""
        steps, sequences = steps or self.sizes.steps, sequences or self.sizes.sequences
        config = {
            "run_name": name,
            "shards": str(self.shards),
            "cache": str(self.folder / "cache"),
            "save_folder": str(self.folder / name),
            "global_train_batch_size": sequences,
            "device_train_microbatch_tokens": microbatch_tokens or sequences * BLOCK_LEN,
            "phases": [{"name": "bench", "steps": steps * len(lengths), "proportions": STREAMS}],
            "curriculum": {"stages": [{"from_step": i * steps, "seq_len": length} for i, length in enumerate(lengths)]},
            "model": model,
            "optimizer": {"lr": 1e-3},
            "scheduler": {"name": "constant"},
            "save_interval": 0,
            "autoresume": True,
        }
        file, out = self.folder / f"{name}.yaml", self.folder / f"{name}.json"
        file.write_text(json.dumps(config))
        out.unlink(missing_ok=True)
        kill = [] if kill_after is None else ["--kill-after", str(kill_after)]
        code = self.process(name, "bench/timed_run.py", str(out), *kill, str(file), *overrides)
        if code != (0 if kill_after is None else -signal.SIGKILL):
            raise Failed(f"{name}: exit code {code}: {self.last_line(name)}")
        save = self.folder / name
        measured = json.loads(out.read_text()) if out.exists() else {"seconds": {}, "flops_per_token": {}}
        for key in ("seconds", "flops_per_token"):
            measured[key] = {int(number): value for number, value in measured[key].items()}
        return Trained(save, _lines(save / "steps.jsonl"), _lines(save / "metrics.jsonl"), measured)

    def process(self, name: str, *command: str) -> int:
        """Run a script of the project with its output in NAME.log; its exit code, or `Failed` past the time limit."""
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return child.wait(max(1.0, min(self.until - time.monotonic(), 1e6)))
            except subprocess.TimeoutExpired:
                raise Failed(f"{name}: not done within its time limit: {self.last_line(name)}") from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # compilers it has started too
                    child.wait()

    def last_line(self, name: str) -> str:
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "nothing printed")

    @cached_property
    def plain(self) -> Trained:
        """The uninterrupted run of the small model that others are compared with."""
        return self.train("plain", self.sizes.small)

    @cached_property
    def shards(self) -> Path:
        """Shards of random words in documents of 100 to 700 tokens, and a tokenizer, as `convert/` lays them out."""
        import numpy as np
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        root, blocks, vocabulary = self.folder / "shards", 512, self.sizes.vocabulary
        words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"word{i}": i for i in range(2, vocabulary)}
        (root / "tokenizer").mkdir(parents=True)
        tokenizer = root / "tokenizer" / "tokenizer.json"
        Tokenizer(WordLevel(words, unk_token="<|padding|>")).save(str(tokenizer))
        form = ShardFormat(BLOCK_LEN, "uint16", False, None, "xxh3_64", 1 << 20)
        rng, streams = np.random.default_rng(0), {}
        for name in STREAMS:
            folder = root / name / "train"
            folder.mkdir(parents=True)
            tokens = (2 + rng.zipf(1.2, blocks * BLOCK_LEN) % (vocabulary - 2)).astype(np.uint16)
            tokens[np.cumsum(rng.integers(100, 700, tokens.size // 700))] = 0
            parts = np.split(tokens.reshape(blocks, BLOCK_LEN), 4)
            entries = [write_shard(form, folder, f"shard.{i:05d}", part, None) for i, part in enumerate(parts)]
            index = index_bytes(entries)
            (folder / "index.json").write_bytes(index)
            digest = hashlib.sha256(index).hexdigest()
            streams[name] = Stream.from_index(digest, 4, blocks, BLOCK_LEN, "random", largest=vocabulary - 1)
        about = manifest.Tokenizer(
            digest=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            vocab_size=vocabulary,
            eos_token="<|endoftext|>",
            eos_id=0,
            pad_token="<|padding|>",
            pad_id=1,
        )
        shared: Any = {"block_len": BLOCK_LEN, "compression": None, "hash": "xxh3_64"}
        settings = {**shared, "shard_bytes": 1 << 20, "streams": dict.fromkeys(streams)}
        whole = Manifest(format=1, dtype="uint16", tokenizer=about, streams=streams, settings=settings, **shared)
        (root / "manifest.json").write_bytes(whole.as_bytes())
        return root


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
