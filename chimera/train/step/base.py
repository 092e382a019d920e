"""The model folder that a run goes on from: what of it an export keeps, whether it is read, and whose tokenizer it has.

A checkpoint holds these files, and checkpoints may be anybody's: an export checks them as a start does.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from chimera.cli import UserError
from chimera.text import one_line
from chimera.tokenizer_file import load

# What `transformers` reads of a model besides its weights: tokenizer, templates, generation, configuration.
KEPT = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.(model|tiktoken|jinja)|tekken\.json|chat_template\.json|generation_config\.json|config\.json"
)
PLACE = re.compile(r"(additional_chat_templates/)?[^/\\\0-\x1f\x7f]{1,200}")  # of one of them in the folder
MOST = 100 << 20  # bytes of one of them; a `.model` above is no tokenizer
Id = Annotated[int, Field(strict=True, ge=-1, lt=1 << 63)]  # -1: none, to some


class _Template(BaseModel):
    name: str
    template: str


class _Tokenizer(BaseModel):
    """What is read of a tokenizer_config.json; other keys are the tokenizer's own."""

    model_config = ConfigDict(strict=True)
    chat_template: str | list[_Template] | dict[str, str] | None = None
    model_max_length: int | float | None = None
    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None


class _Generation(BaseModel):
    """Likewise of a generation_config.json."""

    bos_token_id: Id | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | None = None


KINDS: dict[str, Any] = {"tokenizer_config.json": _Tokenizer, "generation_config.json": _Generation}


def base_files(folder: str) -> dict[str, bytes]:
    """The files of a model folder besides its weights, by their paths in it: a checkpoint keeps them for its export."""
    root = Path(folder)
    paths = [path for path in (*root.glob("*"), *root.glob("additional_chat_templates/*.jinja")) if path.is_file()]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(paths)
        if KEPT.fullmatch(path.name) and path.stat().st_size <= MOST
    }


def check_files(files: Mapping[str, bytes], where: str) -> None:
    """Raise `UserError` for a file of a base that an export could not read, or whose name is none of a base's.

    Args:
        files: as `base_files` has them, maybe from a checkpoint of elsewhere.
        where: what they are of, in words.
    """
    for name, data in files.items():
        if not (PLACE.fullmatch(name) and KEPT.fullmatch(name.rpartition("/")[2])):
            raise UserError(f"{where}: {name!r} is no file of a model folder that is kept")
        try:
            if name.endswith(".json"):
                TypeAdapter(KINDS.get(name, dict[str, Any])).validate_python(json.loads(data))
            elif name.endswith(".jinja"):
                data.decode()
        except ValidationError as error:
            first = error.errors()[0]
            key = f"`{first['loc'][0]}`: " if first["loc"] else ""
            raise UserError(f"{where}: {name}: {key}{one_line(first['msg'])}: correct it") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {name} cannot be read: {one_line(error)[:200]}") from None


def check_pretrained(folder: Any, shards_tokenizer: Path) -> None:
    """Raise `UserError` if a model folder's tokenizer gives a text other ids than the shards' does, or is not there.

    Likewise where its weights are pickles alone. The shards' may have more tokens: then the model's vocabulary grows. A
    folder without a tokenizer.json passes.
    """
    if folder is not None and not isinstance(folder, str):
        raise UserError(f"setting `model.pretrained` is {folder!r}; it is the path of a folder")
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise UserError(
            f"setting `model.pretrained`: there is no folder {folder}: a model of the hub is fetched with `hf download "
            "NAME --local-dir FOLDER`"
        )
    check_files(base_files(folder), f"setting `model.pretrained`: {folder}")
    pickles = sorted(Path(folder).glob("*.bin"))
    if pickles and not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"setting `model.pretrained`: {pickles[0]} is a pickle, and those of others are not read: give a "
            "folder with its weights as safetensors, as `save_pretrained` writes them"
        )
    theirs = Path(folder, "tokenizer.json")
    if not theirs.exists():
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
