"""Checkpoint → Hugging Face folder: `python train/export_hf.py CHECKPOINT OUT`.

Writes the model, its tokenizer and chat template, a generation config and a model card with the mix the weights have
really seen. What a run went on from (`model.pretrained`) stays as it was where the run did not change it. The folder is
loaded as a user would, and is there only if it gives what was trained.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chimera.cli import UserError, run, say
from chimera.stores import is_remote
from chimera.versions import check_versions


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="export_hf.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="ep…-ba…-rank0.pt or latest-rank0.pt, a file or the URI of one")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto: the base's, without one bfloat16 where they were trained in it",
    )
    parser.add_argument(
        "--template", metavar="STREAM", help="whose chat template it speaks, where streams have several"
    )
    args = parser.parse_args(argv)
    check_versions()
    if is_remote(str(args.out)):
        raise UserError(f"{args.out} is not a folder here: an export is written to one, and can be copied from there")
    out = args.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{args.out} is not empty: give a new folder")
    if out == Path.cwd() or out.is_mount():
        raise UserError(f"{args.out} cannot be replaced by an export, though it is empty: give a new folder in it")

    remote = is_remote(args.checkpoint)
    from chimera.train.export.folder import export

    if not remote:
        export(Path(args.checkpoint), out, args.dtype, template=args.template)
    else:
        from chimera.train.run.run_store import fetch

        with tempfile.TemporaryDirectory(prefix="chimera-export-") as folder:
            fetch(args.checkpoint, fetched := Path(folder, "checkpoint.pt"))
            export(fetched, out, args.dtype, template=args.template)
    say(f"{args.out}: model, tokenizer and card written; it loads, and gives what the checkpoint was trained to")
    return 0


def entry() -> None:
    run(main)
