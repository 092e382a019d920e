"""Samples of the shards with their ids, for a checkpoint to keep: what its export is proven on."""

import hashlib
from itertools import islice

from chimera.cli import say
from chimera.mds import Json
from chimera.proof_file import name_of, unpack
from chimera.train.data.shards import Shards, fetch

LINES, TOKENS = 4, 2048  # of a stream, of a line: at most


def proofs_of(shards: Shards, cache: str) -> dict[str, list[Json]]:
    """The first lines of each stream's proof; a damaged one is left out, with a warning."""
    found = {}
    for name, stream in shards.streams.items():
        if not stream.proof:
            continue  # built by others, or by a version that kept none
        file = fetch(shards.root_of(name), name_of(name), cache, digest=stream.proof)
        packed = file.read_bytes() if file else b""
        if hashlib.sha256(packed).hexdigest() != stream.proof:
            at = f"{shards.root_of(name)}/{name_of(name)}"
            say(f"warning: {at} is not the manifest's: exports will not be proven on it")
            continue
        short = (line for line in unpack(packed) if len(line["ids"]) <= TOKENS)
        found[name] = list(islice(short, LINES))
    return found
