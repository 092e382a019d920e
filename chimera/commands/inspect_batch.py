"""Exactly what a step sees: `python train/inspect_batch.py CONFIG step=N [key=value ...] [--json] [--decode] [--mask]`.

For the day a loss spikes at step 31 337: the blocks of its global batch, and with --decode their text, cut at the
step's sequences and at the ends of documents; with --mask also which tokens have a loss.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chimera.cli import UserError, parse, run, say
from chimera.text import json_text, marked, neutral, one_line
from chimera.train.data.cache import ShardCache
from chimera.train.data.places import shown
from chimera.train.data.reader import BlockReader
from chimera.train.data.roots import open_root, plan_with_shards
from chimera.train.data.shards import ShardsTokenizer
from chimera.train.order.ordering import BlockRef, RunOrder, digest, step_blocks

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings

PADDING = re.compile(r"\[\d+ tokens of padding\]")  # what stands for it among a sequence's texts, and is no document


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="inspect_batch.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--decode", action="store_true", help="show the text of the blocks")
    parser.add_argument("--mask", action="store_true", help="and in it what is trained on: ⟦so⟧, on a terminal green")
    args, config, overrides = parse(parser, argv, default_config=None)
    from chimera.train.history.digests import other_shards
    from chimera.train.settings import read_settings
    from chimera.train.step.refusals import refuse

    step = step_of([word for word in overrides if word.startswith("step=")])
    settings = read_settings(config, [word for word in overrides if not word.startswith("step=")])
    plan, indexes = plan_with_shards(settings)
    where = shown(settings.shards)
    if indexes is None:
        raise UserError(f"no shards at {where}: build them, or set `shards` to where they are")
    shards = open_root(settings)
    refuse(settings, plan, shards)
    if settings.branch:
        from chimera.train.run.check_branch import check_branch

        check_branch(settings, plan, indexes, shards)
    if other := other_shards(recorded(Path(settings.save_folder)), indexes):
        say(f"warning: the shards at {where} are not those of the run in {settings.save_folder}: {other}")
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
    if args.decode or args.mask:
        tokenizer = shards.tokenizer
        reader = BlockReader(indexes, ShardCache(settings.cache), plan.block_len)
        tokens, said = read(reader, refs)
        starts = np.array([indexes[ref.stream].starts for ref in refs])
        trained = learned(tokens, said, starts, segment.seq_len, tokenizer, settings) if args.mask else None
        may_start = np.ones(tokens.shape, bool) if said is None else said | ~starts[:, None]
        color = not args.json and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for number, block in enumerate(about["blocks"]):
            mask = None if trained is None else trained[number]
            sequences, ends = (each[number].reshape(-1, segment.seq_len) for each in (tokens, may_start))
            block["text"] = documents(sequences, ends, tokenizer, mask, color)
    print(json_text(about) if args.json else "\n".join(lines(about, safe=args.mask)))
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


def read(reader: BlockReader, refs: list[BlockRef]) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of `refs` and their masks, [blocks, block_len]; no masks where no stream has any."""
    numbers = np.array([reader.names.index(ref.stream) for ref in refs])
    return reader.read(numbers, np.array([ref.block for ref in refs]))


def learned(
    tokens: np.ndarray,
    said: np.ndarray | None,
    starts: np.ndarray,
    seq_len: int,
    tokenizer: ShardsTokenizer,
    settings: "TrainSettings",
) -> np.ndarray:
    """Which tokens a loss is computed for, as training has it; [blocks, sequences, seq_len] bool."""
    import torch

    from chimera.train.step.collate import IGNORED, LabelRules, StepInfo, view_sequences

    info = StepInfo(0, "", seq_len, "", {}, 0, tokens.size // seq_len, unpacked=(), starts=tuple(starts.tolist()))
    masks = None if said is None else torch.from_numpy(np.ascontiguousarray(said))
    batch = {"tokens": torch.from_numpy(tokens.astype(np.int64)), "assistant": masks, "info": info}
    found = view_sequences(batch, LabelRules.of(tokenizer, settings))["labels"].numpy() != IGNORED
    found[:, 0] = False  # which nothing before it predicts
    return found.reshape(len(tokens), -1, seq_len)


def documents(
    sequences: np.ndarray,
    may_start: np.ndarray,
    tokenizer: ShardsTokenizer,
    trained: np.ndarray | None = None,
    color: bool = False,
) -> list[list[str]]:
    """For each of a block's sequences [sequences, seq_len] the texts of its documents, whole or in part.

    A document ends with EOS, which is shown, before a token where one `may_start`; padding is shown as its number of
    tokens. What is `trained` on is marked where that is given. All are of one shape.
    """
    found = []
    for number, sequence in enumerate(sequences):
        texts = []
        eos = sequence == tokenizer.eos_id
        ends = {"eos": np.flatnonzero(eos[:-1] & (may_start[number][1:] | eos[1:])) + 1, "none": np.array([], int)}
        cuts = ends.get(tokenizer.document_ends, np.flatnonzero(np.isin(sequence, tokenizer.bos[:1])))
        for places in np.split(np.arange(len(sequence)), cuts):
            part = sequence[places]
            real = part != tokenizer.pad_id
            kept = part[real]
            if len(kept) and trained is not None:
                texts.append(marked(kept, trained[number][places][real], tokenizer.decode, color))
            elif len(kept):
                texts.append(tokenizer.decode(kept.tolist()))
            if len(kept) < len(part):
                texts.append(f"[{len(part) - len(kept)} tokens of padding]")  # as `PADDING`
        found.append(texts)
    return found


def lines(about: dict[str, Any], safe: bool = False) -> list[str]:
    """The step for people; `safe`: its texts are neutral, but for our own colors."""
    out = [
        f"step {about['step']}: phase {one_line(about['phase'])}, sequences of {about['seq_len']} tokens, "
        f"{len(about['blocks'])} blocks, digest {about['digest']}"
    ]
    for number, block in enumerate(about["blocks"]):
        out.append(
            f"{number:5}  {one_line(block['stream'])}  position {block['position']}, pass {block['pass']}, "
            f"shard {block['shard']}, block {block['block']}"
        )
        for index, texts in enumerate(block.get("text", [])):
            out.append(f"       ── sequence {number * len(block['text']) + index} ──")
            for place, text in enumerate(texts):
                if place and not PADDING.fullmatch(text):
                    out.append("       ┄┄ next document ┄┄")
                out += ["       " + line for line in (text if safe else neutral(text)).split("\n")]
    return out


def entry() -> None:
    run(main)
