"""The model folder that a run goes on from: what of it an export keeps, and whether its tokenizer is the shards'."""

import json
import re
from pathlib import Path
from typing import Any

from chimera.cli import UserError
from chimera.text import one_line
from chimera.tokenizer_file import load

# What `transformers` reads of a model besides its weights: tokenizer, templates, generation, configuration.
KEPT = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.(model|tiktoken|jinja)|tekken\.json|chat_template\.json|generation_config\.json|config\.json"
)
MOST = 100 << 20  # bytes of one of them; a `.model` above is no tokenizer


def base_files(folder: str) -> dict[str, bytes]:
    """The files of a model folder besides its weights, by their paths in it: a checkpoint keeps them for its export."""
    root = Path(folder)
    paths = [path for path in (*root.glob("*"), *root.glob("additional_chat_templates/*.jinja")) if path.is_file()]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(paths)
        if KEPT.fullmatch(path.name) and path.stat().st_size <= MOST
    }


def check_pretrained(folder: Any, shards_tokenizer: Path) -> None:
    """Raise `UserError` if a model folder's tokenizer gives a text other ids than the shards' tokenizer does.

    The shards' may have more tokens: then the model's vocabulary grows. A folder without a tokenizer.json passes.
    """
    if folder is not None and not isinstance(folder, str):
        raise UserError(f"setting `model.pretrained` is {folder!r}; it is the path of a folder")
    theirs = None if folder is None else Path(folder, "tokenizer.json")
    if theirs is None or not theirs.exists():
        return
    known, ours = _read(theirs), _read(shards_tokenizer)
    if difference := _difference(known, ours):
        raise UserError(
            f"setting `model.pretrained`: the tokenizer in {folder} is not the shards': {difference}: build the shards "
            "with it"
        )


def _read(tokenizer_json: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """A tokenizer's ids, and its parts as `tokenizers` writes them, whatever the version that wrote the file."""
    try:
        tokenizer = load(tokenizer_json.read_bytes())
    except Exception as error:  # `tokenizers` raises a bare Exception
        raise UserError(f"{tokenizer_json}: not readable as a tokenizer: {one_line(error)}") from None
    return dict(tokenizer.get_vocab(with_added_tokens=True)), json.loads(tokenizer.to_str())


def _difference(base: tuple[dict[str, int], dict[str, Any]], ours: tuple[dict[str, int], dict[str, Any]]) -> str:
    """What makes other ids of a text in `ours` than in `base`, in words; empty where nothing does."""
    (known, there), (ids, here) = base, ours
    if other := [token for token, number in known.items() if ids.get(token) != number]:
        return f"{len(other)} of its {len(known)} tokens have another id or none there, {other[0]!r} for one"
    for part in ("normalizer", "pre_tokenizer"):
        if there[part] != here[part]:
            return f"their `{part}` differs"
    free = {"vocab", "merges", "dropout"}  # of the model; all that is known has the same ids
    for key in sorted((there["model"].keys() | here["model"].keys()) - free):
        if there["model"].get(key) != here["model"].get(key):
            return f"their `model.{key}` differs"
    merges = there["model"].get("merges") or []
    if (here["model"].get("merges") or [])[: len(merges)] != merges:
        return "their merges differ"
    flags = {token["content"]: token for token in here["added_tokens"]}
    for token in there["added_tokens"]:
        if flags.get(token["content"]) != token:
            return f"the added token {token['content']!r} is matched otherwise there"
    return ""
