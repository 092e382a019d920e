"""Documents → token ids, by `tiktoken` where it is proven to give the ids of `tokenizers`, else by `tokenizers`.

Text is data: special tokens come from a document's integer pieces alone and are never found in text. Added tokens
that are not special (whole words a tokenizer was extended with) are found in text as `tokenizers` finds them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError
from convert.documents import Document
from convert.fastpath import (
    Unequal,
    byte_characters,
    flat,
    merged,
    model_type,
    same_character_classes,
    same_in_pieces,
    tiktoken_encoding,
)
from convert.shards import Array

if TYPE_CHECKING:
    from tiktoken import Encoding

    from convert.settings import TokenizerSettings

BATCH = 1 << 20  # characters handed to `tokenizers` at a time
_UTF_8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # the bytes that occur in it


class Encoder:
    """Encodes the documents of one stream.

    `path` is `tiktoken` or `tokenizers`, `reason` says why. `dtype` is what ids are stored as: uint16, or uint32
    for a vocabulary above 65 536. `digest` is the SHA-256 of the `tokenizer.json`.
    """

    def __init__(self, raw: bytes, eos_token: str, pad_token: str, origin: str, prove: bool = True) -> None:
        """`origin` names the tokenizer in errors; `prove=False` trusts another process's checks and proof."""
        from tokenizers import Tokenizer

        self.digest = hashlib.sha256(raw).hexdigest()
        try:
            spec = json.loads(raw)
            control = {eos_token, pad_token, IM_START, IM_END}
            unmarked = [t for t in spec.get("added_tokens") or [] if t["content"] in control and not t["special"]]
            for token in unmarked:
                token["special"] = True
            random = spec["model"].pop("dropout", None)  # which would give a text other ids each time
            self._tokenizer = Tokenizer.from_str(json.dumps(spec) if unmarked or random else raw.decode())
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise UserError(f"{origin}: not readable as a tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True  # in its words: do not find special tokens, encode their text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: id_ for id_, token in added.items() if token.special}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: DTypeLike = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.eos_id = self._special("eos_token", eos_token, origin)
        self.pad_id = self._special("pad_token", pad_token, origin)
        if self.eos_id == self.pad_id:
            raise UserError(
                f"{origin}: tokenizer.eos_token and tokenizer.pad_token are both {eos_token!r}: they must differ"
            )
        if prove:
            vocab = self._tokenizer.get_vocab(with_added_tokens=False)
            self._check_no_text_is_unknown(spec, vocab, origin)
            self._check_text_is_data(spec["model"], vocab, origin)

        self._long = "" if same_in_pieces(spec) else "; texts above 128 KiB are encoded in pieces, each as its own text"
        self._fast: Encoding | None = None
        self._found: set[str] = set()
        plain = {token.content: id_ for id_, token in added.items() if not token.special}
        try:
            self._fast = tiktoken_encoding(spec, plain, set(self.special_ids), self._tokenizer.model if prove else None)
            self._found = set(plain)
            self._take("tiktoken", "same merges and pre-tokens")
        except Unequal as error:
            self._take("tokenizers", str(error))

    @classmethod
    def from_settings(cls, settings: "TokenizerSettings", path: str | None = None) -> "Encoder":
        """The tokenizer at `settings.path`.

        `path` is what `verify_sample` decided for a stream, handed to a worker. Preparing a tokenizer takes a moment,
        so it is done once for all streams of a process.
        """
        file = tokenizer_file(settings.path)
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer.path: {file} cannot be read ({error.strerror}): give a folder that holds a tokenizer.json, "
                "or make one with `python convert/train_tokenizer.py`"
            ) from None
        encoder = copy(_prepared(raw, settings.eos_token, settings.pad_token, str(file), path is None))
        if path == "tokenizers":
            encoder._leave_fast_path("as decided for the whole stream")
        return encoder

    def check_chat(self, where: str) -> None:
        """Refuse a tokenizer that gives a header and what follows it other ids apart than together, for `where`."""
        whole, header, content = self._encode_slowly(["user\nhi", "user\n", "hi"])
        if not np.array_equal(whole, np.concatenate([header, content])):
            raise UserError(
                f"{where}: `format: chatml` encodes the header of a message apart, to which this tokenizer gives other "
                "ids than at inference (say, as it puts a space before every text): use one without prefix "
                "(add_prefix_space, Prepend), or train one with convert/train_tokenizer.py"
            )

    def verify_sample(self, texts: Sequence[str]) -> None:
        """Keep the fast path only if it gives the ids of `tokenizers` on `texts`, the head of a stream's source."""
        if self._fast is None:
            return
        if not same_character_classes(self._fast._pat_str):
            self._leave_fast_path("the two libraries' Unicode tables differ")
            return
        if not all(map(np.array_equal, self._encode_texts(texts), self._encode_slowly(texts))):
            self._leave_fast_path("tiktoken gave other ids on a sample of the source")
            return
        self._take("tiktoken", f"same merges and pre-tokens; the same ids on a sample of {len(texts)} texts")

    def encode(self, documents: Sequence[Document]) -> list[tuple[Array, Array | None]]:
        """For each document its ids [n] with EOS at the end, and for conversations the assistant mask [n] bool."""
        encoded = self._encode_texts(text.decode() for document in documents for text in document.texts)
        return [self._assemble(document, encoded) for document in documents]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _assemble(self, document: Document, encoded: Iterator[Array]) -> tuple[Array, Array | None]:
        """One document's ids and mask; takes the ids of its texts from `encoded`, one after another."""
        ids, lengths = bytearray(), []  # which grows in place: a long document's ids are in memory once
        for piece in [*document.pieces, self.eos_id]:
            part = next(encoded) if isinstance(piece, bytes) else np.array([piece], dtype=self.dtype)
            ids += part.data
            lengths.append(len(part))
        mask = np.repeat([*document.assistant, False], lengths) if document.assistant else None
        return np.frombuffer(ids, dtype=self.dtype), mask

    def _encode_texts(self, texts: Iterable[str]) -> Iterator[Array]:
        """The ids of each text."""
        if self._fast is None:
            yield from self._encode_slowly(texts)
            return
        for text in texts:
            try:
                ids = self._fast.encode_to_numpy(text, allowed_special=self._found, disallowed_special=())
            except ValueError:  # the regex engine's back-tracking limit
                (ids,) = self._encode_slowly([text])
            yield ids.astype(self.dtype)

    def _encode_slowly(self, texts: Iterable[str]) -> Iterator[Array]:
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters >= BATCH:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[str]) -> Iterator[Array]:
        for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=self.dtype)

    def _special(self, key: str, token: str, origin: str) -> int:
        id_ = self.special_ids.get(token)
        if id_ is None:
            some = ", ".join(sorted(self.special_ids)[:8]) or "none"
            raise UserError(f"{origin}: tokenizer.{key} {token!r} is not among its added tokens (special: {some})")
        return int(id_)

    def _check_no_text_is_unknown(self, spec: Mapping[str, Any], vocab: Mapping[str, int], origin: str) -> None:
        """Refuse a tokenizer whose model has no token for some text and drops it, or makes a special token of it."""
        model = spec["model"]
        unknown = model["unk_id"] if "unk_id" in model else vocab.get(model.get("unk_token"))
        if _has_all_bytes(spec, vocab) or unknown not in (None, *self.special_ids.values()):
            return
        lost = "be lost" if unknown is None else f"become the special token {self._tokenizer.id_to_token(unknown)!r}"
        raise UserError(
            f"{origin}: its model does not know every text, and what it does not would {lost}: use a byte-level BPE "
            "tokenizer with all 256 bytes (train it with initial_alphabet=ByteLevel.alphabet(), or with "
            "convert/train_tokenizer.py)"
        )

    def _check_text_is_data(self, model: Mapping[str, Any], vocab: Mapping[str, int], origin: str) -> None:
        """Refuse a tokenizer whose model makes a special token of plain text: its own, or what its bytes spell."""
        special = {id_: token for token, id_ in self.special_ids.items()}
        made = {*byte_characters().values(), *map(merged, model.get("merges") or ())}
        made.update(_byte_tokens() if model.get("byte_fallback") else ())
        if reached := sorted(special.keys() & {vocab.get(token) for token in made}):
            raise _no_data(origin, "takes bytes of plain text", special[reached[0]], reached[0])
        spelled = [token for token, id_ in vocab.items() if id_ in special]
        for token in sorted({*special.values(), *spelled, *filter(None, map(_text_of, spelled))}):
            for text in (token, f"a{token}a", f" {token} "):
                (ids,) = self._encode_slowly([text])
                if hit := sorted(special.keys() & ids.tolist()):
                    raise _no_data(origin, f"encodes the plain text {text!r}", special[hit[0]], hit[0])

    def _leave_fast_path(self, reason: str) -> None:
        self._fast, self._found = None, set()
        self._take("tokenizers", reason)

    def _take(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason + self._long


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


@lru_cache(maxsize=2)
def _prepared(raw: bytes, eos_token: str, pad_token: str, origin: str, prove: bool) -> Encoder:
    return Encoder(raw, eos_token, pad_token, origin, prove)


def tokenizer_file(path: str) -> Path:
    """The `tokenizer.json` that `path`, a folder or the file itself, stands for."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
