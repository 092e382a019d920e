"""Token shards made by others (llm-foundry, any MDSWriter): no manifest, so the config names the tokenizer.

Their blocks have one fixed length and no padding. Documents end with the tokenizer's EOS, which the first blocks must
bear out, or as the setting `document_ends` says.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from chimera.cli import UserError
from chimera.manifest import Stream
from chimera.mds import Array
from chimera.stores import is_remote
from chimera.tokenizer_file import BESIDE, FILES, before_text, load, special_token
from chimera.train.data.cache import ShardCache
from chimera.train.data.index import open_indexes
from chimera.train.data.reader import first_blocks, stored_block_len
from chimera.train.data.shards import NO_PADDING, Shards, ShardsTokenizer, fetch

LOOKED_AT = 64  # blocks of each stream


def open_external(
    root: str, cache: str, tokenizer: str, streams: Sequence[str], document_ends: str | None = None
) -> Shards:
    """Shards of `streams` at `root`, described as a manifest would; raises `UserError` where something is missing.

    Args:
        tokenizer: folder, here or in a store, with tokenizer.json, and for its EOS tokenizer_config.json or
            special_tokens_map.json.
        document_ends: what parts documents, eos, bos or none; None: EOS, where the first blocks do not deny it.
    """
    indexes = open_indexes(root, cache, streams)
    if any(fetch(root, f"rejects/{name}.jsonl.zst", cache) is not None for name in streams):
        raise UserError(
            f"the shards at {root} are of convert/build_shards.py, but their manifest.json is missing: without it "
            "their padding would be trained on: finish the build, or the copy of it"
        )
    block_len = stored_block_len(next(iter(indexes.values())), ShardCache(cache))
    here = Path(tokenizer)
    if is_remote(tokenizer):
        files = [fetch(tokenizer, name, cache) for name in (FILES[0], *BESIDE)]
        here = next((file.parent for file in files if file is not None), here)
    opened = read_tokenizer(here, document_ends or "eos")
    first = {name: first_blocks(index, ShardCache(cache), LOOKED_AT) for name, index in indexes.items()}
    for name, blocks in first.items():
        if (other := blocks[(blocks < 0) | (blocks >= opened.vocab_size)]).size:
            raise UserError(
                f"stream `{name}` at {root} holds token id {other[0]}, and the ids of {tokenizer} end at "
                f"{opened.vocab_size - 1}: name the tokenizer they were made with (in a column of `bytes`, an id is 8 "
                "bytes)"
            )
    if document_ends is None:
        for name, blocks in first.items():
            if doubt := doubtful_ends(blocks, opened, special_ids(opened.path)):
                raise UserError(
                    f"stream `{name}` at {root}: {doubt}: say how documents are told apart, `document_ends: eos` (as "
                    "it is), `bos` (each begins with BOS) or `none` (a sequence is one)"
                )
    if document_ends != "bos" and not any(np.isin(opened.bos, blocks).any() for blocks in first.values()):
        opened = replace(opened, bos=())  # nor do prompts and exports begin with it
    described = [opened.digest, *((name, index.fingerprint) for name, index in sorted(indexes.items()))]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    known = {
        name: Stream.from_index(index.fingerprint, len(index.shards), index.blocks, block_len, index.folder)
        for name, index in indexes.items()
    }
    return Shards(root, digest, opened, block_len, known)


def doubtful_ends(blocks: Array, tokenizer: ShardsTokenizer, special: frozenset[int]) -> str | None:
    """Why EOS does not seem to end the documents of the first blocks [n, block_len] of a stream; `None`: it does.

    EOS that ends the turns of conversations is followed by a next turn: where documents begin with BOS, by anything but
    that; where they do not, by the special token that opens a turn, which is then no more frequent than EOS itself.
    """
    eos, token = blocks == tokenizer.eos_id, repr(tokenizer.eos_token)
    if not eos.any():
        return f"none of its first {len(blocks)} blocks holds {token}, the tokenizer's EOS"
    ends, after = int(eos[:, :-2].sum()), [blocks[:, 1:-1][eos[:, :-2]], blocks[:, 2:][eos[:, :-2]]]
    if not ends:
        return None
    turns = f"{token}, the tokenizer's EOS, seems to end every turn and not only a document"
    if tokenizer.bos and (blocks == tokenizer.bos[0]).any():
        within = int((after[0] != tokenizer.bos[0]).sum())
        return f"{turns} ({within} of {ends} are not followed by BOS)" if within > ends / 10 else None
    opens = [next((int(id_) for id_ in two if int(id_) in special), -1) for two in zip(*after, strict=True)]
    opener, count = Counter(opens).most_common(1)[0]
    if opener in (-1, tokenizer.eos_id) or count < 0.8 * ends or int((blocks == opener).sum()) > 1.25 * int(eos.sum()):
        return None
    return f"{turns} ({count} of {ends} are followed by {tokenizer.decode([opener])!r})"


def special_ids(tokenizer_json: Path) -> frozenset[int]:
    added = load(tokenizer_json.read_bytes()).get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


def read_tokenizer(folder: Path, document_ends: str = "eos") -> ShardsTokenizer:
    """The tokenizer of a folder that has a tokenizer.json and names its EOS."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"setting `tokenizer`: no tokenizer.json in {folder}")
    loaded = load(file.read_bytes())
    eos = special_token(folder, "eos_token")
    eos_id = None if eos is None else loaded.token_to_id(eos)
    if eos_id is None:
        raise UserError(
            f"setting `tokenizer`: {folder} names no eos_token that its tokenizer.json has: documents end with it"
        )
    size = max(loaded.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    named = special_token(folder, "bos_token")
    first = before_text(loaded) or [] if named is None else [loaded.token_to_id(named)]
    bos = [id_ for id_ in first if id_ is not None and id_ != eos_id]
    if document_ends == "bos" and not bos:
        raise UserError(
            f"setting `document_ends: bos`: {folder} names no bos_token that its tokenizer.json has, other than its EOS"
        )
    return ShardsTokenizer(file, digest, size, int(eos_id), NO_PADDING, str(eos), str(eos), bos, document_ends)


def turn_end(folder: Path) -> str | None:
    """A tokenizer folder's eos_token, where its chat template ends each turn with it; else None."""
    eos = special_token(folder, "eos_token")
    if not eos or not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        one, two = (tokenizer.apply_chat_template(turn * n, tokenize=False).count(eos) for n in (1, 2))
    except Exception:  # no template, or one that needs other turns
        return None
    return eos if two > one else None
