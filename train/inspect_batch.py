"""Exactly what a step sees: `python train/inspect_batch.py CONFIG step=N [key=value ...] [--json] [--decode]`.

For the day a loss spikes at step 31 337: the blocks of its global batch, and with --decode their text, cut at the
step's sequences and at the ends of documents.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chimera.cli import UserError, parse, run, say
from train.cache import ShardCache
from train.digests import other_shards
from train.main import open_root
from train.ordering import BlockRef, RunOrder, digest, step_blocks
from train.plan import plan_with_shards
from train.reader import BlockReader
from train.settings import read_settings
from train.shards import ShardsTokenizer

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # text is data: it must not steer the terminal


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="inspect_batch.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--decode", action="store_true", help="show the text of the blocks")
    args, config, overrides = parse(parser, argv, default_config=None)
    step = step_of([word for word in overrides if word.startswith("step=")])
    settings = read_settings(config, [word for word in overrides if not word.startswith("step=")])
    plan, indexes = plan_with_shards(settings)
    if indexes is None:
        raise UserError(f"no shards at {settings.shards}: build them, or set `shards` to where they are")
    if other := other_shards(recorded(Path(settings.save_folder)), indexes):
        say(f"warning: the shards at {settings.shards} are not those of the run in {settings.save_folder}: {other}")
    segment = plan.segment(step)
    order = RunOrder(plan, {name: index.shard_blocks for name, index in indexes.items()}, settings.seed)
    refs = step_blocks(order, step)
    about: dict[str, Any] = {
        "step": step,
        "phase": segment.phase_name,
        "seq_len": segment.seq_len,
        "digest": digest((ref.stream, ref.block) for ref in refs),
        "blocks": [
            {"stream": r.stream, "position": r.position, "pass": r.pass_, "shard": r.shard, "block": r.block}
            for r in refs
        ],
    }
    if args.decode:
        tokenizer = open_root(settings).tokenizer
        reader = BlockReader(indexes, ShardCache(settings.shards, settings.cache), plan.block_len)
        for block, tokens in zip(about["blocks"], read(reader, refs), strict=True):
            block["text"] = documents(tokens.reshape(-1, segment.seq_len), tokenizer)
    print(json.dumps(about, ensure_ascii=False) if args.json else "\n".join(lines(about)))
    return 0


def recorded(folder: Path) -> dict[str, Any]:
    """What the run in a local save folder wrote in config.json; empty where there is none to be read."""
    with suppress(OSError, ValueError):
        about = json.loads((folder / "config.json").read_bytes())
        return about if isinstance(about, dict) else {}
    return {}


def step_of(words: list[str]) -> int:
    """The N of `step=N`."""
    if len(words) != 1 or not words[0][5:].isdecimal():
        raise UserError(f"which step? Give step=N, a number from 0 (got {', '.join(words) or 'none'})")
    return int(words[0][5:])


def read(reader: BlockReader, refs: list[BlockRef]) -> np.ndarray:
    """The tokens of `refs`, [blocks, block_len]."""
    numbers = np.array([reader.names.index(ref.stream) for ref in refs])
    return reader.read(numbers, np.array([ref.block for ref in refs]))[0]


def documents(sequences: np.ndarray, tokenizer: ShardsTokenizer) -> list[list[str]]:
    """For each of a block's sequences [sequences, seq_len] the texts of its documents, whole or in part.

    A document ends with EOS, which is shown; padding is shown as its number of tokens.
    """
    found = []
    for sequence in sequences:
        texts = []
        ends = np.flatnonzero(sequence == tokenizer.eos_id) + 1
        for part in np.split(sequence, ends):
            kept = part[part != tokenizer.pad_id]
            if len(kept):
                texts.append(tokenizer.decode(kept.tolist()))
            if len(kept) < len(part):
                texts.append(f"[{len(part) - len(kept)} tokens of padding]")
        found.append(texts)
    return found


def lines(about: dict[str, Any]) -> list[str]:
    """The step for people."""
    out = [
        f"step {about['step']}: phase {about['phase']}, sequences of {about['seq_len']} tokens, "
        f"{len(about['blocks'])} blocks, digest {about['digest']}"
    ]
    for number, block in enumerate(about["blocks"]):
        out.append(
            f"{number:5}  {block['stream']}  position {block['position']}, pass {block['pass']}, "
            f"shard {block['shard']}, block {block['block']}"
        )
        for index, texts in enumerate(block.get("text", [])):
            out.append(f"       ── sequence {number * len(block['text']) + index} ──")
            for place, text in enumerate(texts):
                if place:
                    out.append("       ┄┄ next document ┄┄")
                out += ["       " + CONTROL.sub("\N{REPLACEMENT CHARACTER}", line) for line in text.split("\n")]
    return out


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
