"""Refusals of tokenizers that lose text, or make a special token of plain text."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from tokenizers import Tokenizer

from chimera.cli import UserError
from chimera.convert.encode.equivalence import byte_characters, flat, merged, model_type

_UTF_8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # the bytes that occur in it


def check_no_text_is_unknown(spec: Mapping[str, Any], vocab: Mapping[str, int], origin: str, loaded: Tokenizer) -> None:
    """Refuse a tokenizer whose model has no token for some text and drops it, or makes one unknown token of it."""
    model = spec["model"]
    unknown = model["unk_id"] if "unk_id" in model else vocab.get(model.get("unk_token"))
    if _has_all_bytes(spec, vocab):
        return
    lost = "be lost" if unknown is None else f"become the token {loaded.id_to_token(unknown)!r}"
    raise UserError(
        f"{origin}: its model ({model_type(model)}) does not know every text, and what it does not would {lost}: "
        "use a byte-level BPE tokenizer with all 256 bytes (train it with "
        "initial_alphabet=ByteLevel.alphabet(), or with convert/train_tokenizer.py)"
    )


def check_text_is_data(
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    origin: str,
    loaded: Any,
    special_ids: Mapping[str, int],
) -> None:
    """Refuse a tokenizer whose model makes a special token of plain text: its own, or what its bytes spell."""
    special = {id_: token for token, id_ in special_ids.items()}
    made = {*byte_characters().values(), *map(merged, model.get("merges") or ())}
    made.update(_byte_tokens() if model.get("byte_fallback") else ())
    if reached := sorted(special.keys() & {vocab.get(token) for token in made}):
        raise _no_data(origin, "takes bytes of plain text", special[reached[0]], reached[0])
    spelled = [token for token, id_ in vocab.items() if id_ in special]
    for token in sorted({*special.values(), *spelled, *filter(None, map(_text_of, spelled))}):
        for text in (token, f"a{token}a", f" {token} "):
            ids = loaded.encode(text, add_special_tokens=False).ids
            if hit := sorted(special.keys() & set(ids)):
                raise _no_data(origin, f"encodes the plain text {text!r}", special[hit[0]], hit[0])


def _has_all_bytes(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    """Whether every text comes down to bytes that each have a token of the model."""
    model = spec["model"]
    if model_type(model) not in ("BPE", "Unigram"):
        return False
    if model.get("byte_fallback") and vocab.keys() >= _byte_tokens():
        return True
    steps = [*flat(spec.get("normalizer")), *flat(spec.get("pre_tokenizer"))]
    before, behind = (model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    forms = product({"", before}, (byte_characters()[byte] for byte in _UTF_8), {"", behind})
    return any(step["type"] == "ByteLevel" for step in steps) and vocab.keys() >= set(map("".join, forms))


def _byte_tokens() -> set[str]:
    """What a model with `byte_fallback` makes of characters that are not in its vocabulary."""
    return {f"<0x{byte:02X}>" for byte in _UTF_8}


def _text_of(token: str) -> str | None:
    """The text that a byte-level token stands for, if it is one."""
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    try:
        return bytes(bytes_of[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def _no_data(origin: str, does: str, token: str, id_: int) -> UserError:
    return UserError(
        f"{origin}: {does} as the special token {token!r} (id {id_}), so that text could end a document: give that "
        "token a text of its own, or use a byte-level BPE tokenizer (convert/train_tokenizer.py makes one)"
    )
