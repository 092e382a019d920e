"""Are the small files of a finished output those that its manifest leads to? Compared whenever a build meets one.

Shards and rejects, whose bytes have no bound, are `verify_shards.py`'s.
"""

from chimera.cli import UserError
from chimera.convert.build.outputs import Output
from chimera.manifest import Manifest
from chimera.mds import digest
from chimera.proof_file import name_of

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
