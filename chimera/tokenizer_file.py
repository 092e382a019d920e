"""A tokenizer's file: where it is, the one place that loads it, what it puts before a text, and tokens added to it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from chimera import tekken
from chimera.cli import UserError
from chimera.objects import Objects
from chimera.stores import is_remote
from chimera.text import one_line

FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")  # the first that is there counts
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@contextmanager
def file_of(path: str) -> Iterator[Path]:
    """The tokenizer's file that `path` means: a folder's, or that file, here or in a store; its other files beside it.

    What a store has is fetched for as long as the context lasts. Raises `UserError` where a store has none.
    """
    if not is_remote(path):
        folder = Path(path)
        found = [folder / name for name in FILES if (folder / name).is_file()] or sorted(folder.glob("*.tiktoken"))
        yield (found or [folder / FILES[0]])[0] if folder.is_dir() else folder
        return
    url, _, last = path.rstrip("/").rpartition("/")
    named = last.endswith((".json", ".model", ".tiktoken"))
    store = Objects(url if named else path)
    with tempfile.TemporaryDirectory(prefix="chimera-tokenizer-") as scratch:
        held = {name: store.find(name) for name in dict.fromkeys((*([last] if named else FILES), *BESIDE))}
        for name, data in held.items():
            if data is not None:
                Path(scratch, name).write_bytes(data)
        found = [Path(scratch, name) for name in ([last] if named else FILES) if held[name] is not None]
        if not found:
            raise UserError(f"no tokenizer at {path}: give a folder that holds a tokenizer.json, or that file")
        yield found[0]


def read_json(file: Path) -> bytes:
    """The `tokenizer.json` in a tokenizer's file, of SentencePiece's `tokenizer.model` as `transformers` converts it.

    Of Mistral's `tekken.json` as tekken.py does. Raises `OSError` where it cannot be read, `UserError` where it cannot
    be converted.
    """
    raw = file.read_bytes()
    tekken.refuse_ranks(file.name, raw[:200])
    if file.suffix != ".model":
        return tekken.tokenizer_json(file.name, raw, load) if "tekken" in file.name else raw
    try:
        import sentencepiece  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 (whether it is there)
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(file.parent, local_files_only=True)
        raw = str(loaded.backend_tokenizer.to_str()).encode()
    except ImportError:
        raise UserError(f"{file.name}: converting it needs sentencepiece: `pip install sentencepiece`") from None
    except Exception as error:  # of many kinds
        raise UserError(
            f"{file.name}: transformers does not convert it ({one_line(error)[:200]}): give a tokenizer_config.json "
            "beside it that names its `tokenizer_class`, or a tokenizer.json"
        ) from None
    made, text = load(raw), "a  b\nc"
    if (again := made.decode(made.encode(text, add_special_tokens=False).ids)) != text:
        raise UserError(f"{file.name}: as transformers converts it, text is lost: {text!r} becomes {again!r}")
    return raw


def load(tokenizer_json: str | bytes) -> Tokenizer:
    """The tokenizer in the text of a `tokenizer.json`, without the file's own truncation, padding and dropout.

    Each of them would give a text other ids than its own, in silence. Raises `Exception`, the only kind that
    `tokenizers` has, for what is no tokenizer.
    """
    try:
        loaded = Tokenizer.from_str(tokenizer_json if isinstance(tokenizer_json, str) else tokenizer_json.decode())
        with suppress(Exception):  # a text that it does not know, which is not for here
            loaded.encode("a")  # a post-processor that names what is not there panics
    except BaseException as error:
        if gave_up(error):
            raise Exception(str(error)) from None
        raise
    loaded.no_truncation()
    loaded.no_padding()
    if getattr(loaded.model, "dropout", None):
        loaded.model.dropout = None
    return loaded


def gave_up(error: BaseException) -> bool:
    """Whether `error` says that a tokenizer failed on what it was given, rather than we.

    A panic in Rust is a `BaseException` of a class that nobody exports; else `tokenizers` raises a bare `Exception`.
    """
    return type(error).__name__ == "PanicException" or type(error) is Exception


def before_text(loaded: Tokenizer) -> list[int]:
    """The ids that the tokenizer's post-processor puts before a text: its BOS, if any.

    `AutoTokenizer` puts the same there. (Of transformers 4, the classes of Llama and Gemma go by the `add_bos_token` of
    `tokenizer_config.json` instead; 5 goes by the post-processor for all.)
    """
    plain, whole = (loaded.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:at])


def put_before_text(loaded: Tokenizer, ids: Sequence[int]) -> None:
    """Have the tokenizer put `ids` before a text, and nothing after it."""
    if before_text(loaded) == list(ids):
        return
    tokens = [str(loaded.id_to_token(id_)) for id_ in ids]
    special: Any = [(token, id_) for token, id_ in dict(zip(tokens, ids, strict=True)).items()]
    loaded.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], pair=[*tokens, "$A", "$B:1"], special_tokens=special
    )


def with_tokens(tokenizer_json: bytes, tokens: Sequence[str]) -> bytes:
    """The `tokenizer.json` with `tokens` as special tokens; those it has already stay as they are."""
    spec = json.loads(tokenizer_json)
    added = spec.setdefault("added_tokens", []) or []
    held = {token["content"] for token in added if token["special"]}
    new = [token for token in dict.fromkeys(tokens) if token not in held]
    if not new:
        return tokenizer_json
    known = load(tokenizer_json).get_vocab(with_added_tokens=True)
    spec["added_tokens"] = [token for token in added if token["content"] not in new]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in new:
        id_ = known.setdefault(token, max(known.values(), default=-1) + 1)
        spec["added_tokens"].append({"id": id_, "content": token, "special": True, **flags})
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return json.dumps(spec, ensure_ascii=False).encode()


def special_token(folder: Path, key: str) -> str | None:
    """A special token as the `tokenizer_config.json` or `special_tokens_map.json` of a folder gives it."""
    return _special_token(folder, key)[0]


def special_token_file(folder: Path, key: str) -> str | None:
    """The name of the file that `special_token` has it from."""
    return _special_token(folder, key)[1]


def _special_token(folder: Path, key: str) -> tuple[str, str] | tuple[None, None]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            value: Any = json.loads((folder / name).read_bytes()).get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value, name
    return None, None
