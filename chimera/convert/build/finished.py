"""A finished output: what its manifest says of a stream, and whether its small files are those that it leads to.

They are compared whenever a build meets one. Shards and rejects, whose bytes have no bound, are `verify_shards.py`'s.
"""

from chimera.cli import UserError
from chimera.convert.build.outputs import Output
from chimera.manifest import Manifest, Stream
from chimera.mds import digest
from chimera.proof_file import name_of
from chimera.text import one_line

CHECKED = "its indexes, proofs and tokenizer are those of its manifest; `verify_shards.py {}` reads all of it"


def check_small_files(manifest: Manifest, output: Output) -> None:
    """Raise `UserError` that names the first file of an output that is missing, or is not the one of its manifest."""
    wanted: dict[str, str | None] = {"tokenizer/tokenizer.json": manifest.tokenizer.digest}
    for name, stream in manifest.streams.items():
        wanted |= {f"{name}/{split}/index.json": found.index for split, found in stream.splits.items()}
        wanted[name_of(name)] = stream.proof
    for key, sha256 in wanted.items():
        if sha256 is None:  # there is none, or an earlier version kept no hash of it
            continue
        data = output.read(key)
        if data is None or digest("sha256", data) != sha256:
            what = "missing" if data is None else "not the one of its manifest"
            raise UserError(
                f"{output.name}/{key} is {what}: bring it back, or remove {output.name}/manifest.json and build again "
                "with `rebuild=true`"
            )


def summary(stream: Stream, limit: int | None) -> str:
    """What became of a stream's rows."""
    rows, train = stream.rows, stream.train
    split, purpose = (train, "train") if train.blocks else (stream.eval, "evaluate")
    dropped = [
        f"{kind}: {', '.join(f'{count} {reason}' for reason, count in counts.items())}"
        for kind, counts in (("filtered", rows.filtered), ("rejected", rows.rejected))
        if counts
    ]
    for says, counts in (
        ("longer than a block", stream.too_long),
        ("answers not learned", {why: count for why, count in stream.turns.items() if why != "each"}),
        ("trained on, and in the validation set too", stream.overlap),
        ("fields passed over", stream.ignored),
    ):
        if counts:
            more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
            named = ", ".join(f"{count} {one_line(name)}" for name, count in [*counts.items()][:8])
            dropped.append(f"{says}: {named}{more}")
    reasons = f" ({'; '.join(dropped)})" if dropped else ""
    each = ", one an answer," if "each" in stream.turns else ""
    short = f", all there are (max_tokens: {limit})" if limit and train.tokens < limit else ""
    return (
        f"{rows.documents} documents{each} of {rows.read} rows{reasons}; to {purpose} on: {split.tokens} tokens in "
        f"{split.blocks} blocks{short}"
    )
