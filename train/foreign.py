"""Token shards made by others (llm-foundry, any MDSWriter): no manifest, so the config names the tokenizer.

Their blocks have one fixed length and no padding; documents end with the tokenizer's EOS.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chimera.cli import UserError
from train.cache import ShardCache
from train.index import open_indexes
from train.reader import stored_block_len
from train.shards import Shards, ShardsTokenizer, fetch

NO_PADDING = -1  # an id no token has


def open_foreign(root: str, cache: str, tokenizer: str, streams: Sequence[str]) -> Shards:
    """Shards of `streams` at `root`, described as a manifest would; raises `UserError` where something is missing.

    Args:
        tokenizer: folder with tokenizer.json, and tokenizer_config.json or special_tokens_map.json for its EOS.
    """
    indexes = open_indexes(root, cache, streams)
    if any(fetch(root, f"rejects/{name}.jsonl.zst", cache) is not None for name in streams):
        raise UserError(
            f"the shards at {root} are of convert/build_shards.py, but their manifest.json is missing: without it "
            "their padding would be trained on: finish the build, or the copy of it"
        )
    block_len = stored_block_len(next(iter(indexes.values())), ShardCache(root, cache))
    opened, digest = read_tokenizer(Path(tokenizer))
    manifest = {
        "block_len": block_len,
        "tokenizer": {"digest": digest},
        "streams": {
            name: {
                "format": "text",
                "packing": "concat",
                "source": {"describe": index.folder},
                "train": {"blocks": index.blocks, "index": index.fingerprint},
                "eval": {"blocks": 0},
            }
            for name, index in indexes.items()
        },
    }
    described = json.dumps(manifest, sort_keys=True).encode()
    return Shards(root, manifest, hashlib.sha256(described).hexdigest(), opened)


def read_tokenizer(folder: Path) -> tuple[ShardsTokenizer, str]:
    """A tokenizer folder's ids and special tokens, and the digest of its tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"setting `tokenizer`: no tokenizer.json in {folder}")
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(file))
    eos = special_token(folder, "eos_token")
    eos_id = None if eos is None else loaded.token_to_id(eos)
    if eos_id is None:
        raise UserError(
            f"setting `tokenizer`: {folder} names no eos_token that its tokenizer.json has: documents end with it"
        )
    size = max(loaded.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ShardsTokenizer(file, size, int(eos_id), NO_PADDING, str(eos), str(eos)), digest


def special_token(folder: Path, key: str) -> str | None:
    """A special token as tokenizer_config.json or special_tokens_map.json gives it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            value: Any = json.loads((folder / name).read_bytes()).get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
    return None
