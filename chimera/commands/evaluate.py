"""A checkpoint's loss on the eval splits: `python train/evaluate.py CHECKPOINT [CONFIG] [key=value ...] [--json]`.

Loss and perplexity of each stream at each sequence length: the numbers that the run logs at that step. Without a CONFIG
the settings are the run's own, in the config.json beside the checkpoint.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chimera.cli import UserError, parse, run, show
from chimera.stores import is_remote
from chimera.text import decimal, json_text, one_line, table
from chimera.versions import check_versions, complete_composer

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings

BESIDE = "the run's own, in config.json beside the checkpoint"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="ep…-ba…-rank0.pt or latest-rank0.pt, a file or the URI of one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, config, overrides = parse(parser, argv, default_config=BESIDE)
    check_versions()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("evaluate.py is one process: start it with python, not with a launcher of ranks")
    from chimera.train.settings import read_settings

    if not is_remote(args.checkpoint) and not Path(args.checkpoint).exists():
        raise UserError(f"no checkpoint at {args.checkpoint}")
    given = str(config) != BESIDE
    settings = read_settings(config, overrides) if given else own_settings(args.checkpoint, overrides)
    settings.eval.interval = settings.eval.interval or 1  # 0: the run evaluates nothing
    settings.parallelism = {}  # of one process nothing is cut

    from chimera.train.data.roots import allow_open_files, open_root
    from chimera.train.step.refusals import refuse

    allow_open_files()
    shards = open_root(settings)
    plan = shards.plan(settings)
    refuse(settings, plan, shards)

    from chimera.train.run.evaluate_checkpoint import evaluate

    complete_composer()
    if not is_remote(args.checkpoint):
        step, results = evaluate(settings, shards, plan, Path(args.checkpoint))
    else:
        from chimera.train.run.run_store import fetch

        with tempfile.TemporaryDirectory(prefix="chimera-evaluate-") as folder:
            fetch(args.checkpoint, fetched := Path(folder, "checkpoint.pt"))
            step, results = evaluate(settings, shards, plan, fetched)
    if args.json:
        show(json_text({"checkpoint": args.checkpoint, "step": step, "streams": results}))
        return 0
    rows = [
        (stream, str(seq_len), decimal(found["loss"]), decimal(found["perplexity"]), str(found["tokens"]))
        for stream, lengths in results.items()
        for seq_len, found in lengths.items()
    ]
    show(f"{one_line(args.checkpoint)}: after {step} steps\n")
    show("\n".join(table(("stream", "length", "loss", "perplexity", "tokens"), rows)))
    return 0


def own_settings(checkpoint: str, overrides: Sequence[str]) -> "TrainSettings":
    """The settings in the config.json beside a checkpoint, a file or the URI of one, under `overrides`."""
    from chimera.objects import Objects
    from chimera.train.history.run_files import read_config

    if is_remote(checkpoint):
        folder = checkpoint.rpartition("/")[0]
        data = Objects(folder).find("config.json")
    else:
        folder = str(Path(checkpoint).resolve().parent)
        file = Path(folder, "config.json")
        data = file.read_bytes() if file.is_file() else None
    if data is None:
        raise UserError(f"no config.json beside {checkpoint}: give the CONFIG of its run after it")
    return read_config(data, f"{folder}/config.json", overrides)[1]


def entry() -> None:
    run(main)
