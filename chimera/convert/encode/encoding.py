"""Documents → token ids, by the fastest engine that is proven to give the ids of `tokenizers` (see `engines`).

Text is data: special tokens come from a document's integer pieces alone and are never found in text. Added tokens
that are not special (whole words a tokenizer was extended with) are found in text as `tokenizers` finds them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError
from chimera.convert.encode.assembling import Encoded, assembled, batched, woven
from chimera.convert.encode.control import ControlToken, ControlTokens, GoesOn
from chimera.convert.encode.document import Document
from chimera.convert.encode.engines import NAMES, Engine, Flat, Given, Tokenizers, choose, joined, wanted
from chimera.convert.encode.equivalence import same_in_pieces
from chimera.convert.encode.joints import prefix_of, without_prefix
from chimera.convert.encode.text_is_data import check_no_text_is_unknown, check_text_is_data
from chimera.mds import Array
from chimera.stores import is_remote
from chimera.tokenizer_file import before_text, file_of, load, read_json, special_token, special_token_file, with_tokens

if TYPE_CHECKING:
    from chimera.convert.settings import TokenizerSettings


class Encoder:
    """Encodes the documents of one stream.

    `path` is the name of its engine, `reason` says why. `dtype` is what ids are stored as: uint16, or uint32
    for a vocabulary above 65 536. `raw` is the `tokenizer.json`, `digest` its SHA-256. `bos` are the ids that each text
    begins with. `fill_id` is what blocks are filled with: padding, or EOS where there is none (`pad_id` is `None`).
    """

    def __init__(
        self,
        raw: bytes,
        eos_token: str,
        pad_token: str | None,
        origin: str,
        prove: bool = True,
        control_tokens: Sequence[str] = (),
        engine: str | None = None,
    ) -> None:
        """`origin` names the tokenizer in errors; `prove=False` trusts another process's checks and proof.

        `control_tokens` are added tokens that are special here, whatever the tokenizer says. `engine` is the first that
        is tried; `None`: see `engines.wanted`.
        """
        engine = engine or wanted()
        self.raw, self.digest = raw, hashlib.sha256(raw).hexdigest()
        self._origin = raw, eos_token, pad_token, origin, prove, engine
        try:
            spec = json.loads(raw)
            control = {eos_token, pad_token, IM_START, IM_END, *control_tokens}
            unmarked = [t for t in spec.get("added_tokens") or [] if t["content"] in control and not t["special"]]
            for token in unmarked:
                token["special"] = True
            spec["model"].pop("dropout", None)  # `load` turns it off
            self._tokenizer: Any = _of_text_alone(json.dumps(spec) if unmarked else raw)
            self.prefix = prefix_of(spec)
            self._going_on = self._tokenizer  # for text that goes on with text before it
            if self.prefix != "none":
                self._going_on = _of_text_alone(json.dumps(without_prefix(spec)))
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise UserError(f"{origin}: not readable as a tokenizer: {error}") from None

        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: id_ for id_, token in added.items() if token.special}
        self.plain_tokens = tuple(token.content for token in added.values() if not token.special)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.eos_id = self._special("eos_token", eos_token, origin)
        self.pad_id = None if pad_token is None else self._special("pad_token", pad_token, origin)
        self.fill_id = self.eos_id if self.pad_id is None else self.pad_id
        self.bos: tuple[int, ...] = ()
        if self.eos_id == self.pad_id:
            raise UserError(
                f"{origin}: tokenizer.eos_token and tokenizer.pad_token are both {eos_token!r}: they must differ"
            )
        if prove:
            vocab = self._tokenizer.get_vocab(with_added_tokens=False)
            check_no_text_is_unknown(spec, vocab, origin, self._tokenizer)
            check_text_is_data(spec["model"], vocab, origin, self._tokenizer, self.special_ids)

        self._long = "" if same_in_pieces(spec) else "; texts above 128 KiB are encoded in pieces, each as its own text"
        self._engine: Engine
        self._choose(engine, spec)

    @classmethod
    def from_settings(cls, settings: "TokenizerSettings", path: str | None = None) -> "Encoder":
        """The tokenizer at `settings.path`, with `settings.add_tokens`.

        `path` is what `verify_sample` decided for a stream, handed to a worker. Preparing a tokenizer takes a moment,
        so it is done once for all streams of a process.
        """
        with file_of(settings.path) as file:
            name = settings.path if is_remote(settings.path) else str(file)
            try:
                raw = read_json(file)
                raw = with_tokens(raw, settings.add_tokens) if settings.add_tokens else raw
            except UserError as error:
                raise UserError(f"tokenizer.path: {settings.path}: {error}") from None
            except OSError as error:
                raise UserError(
                    f"tokenizer.path: {file} cannot be read ({error.strerror}): give a folder that holds a "
                    "tokenizer.json (`hf download NAME --local-dir FOLDER` fetches one of the hub), or make one with "
                    "`python convert/train_tokenizer.py`"
                ) from None
            except Exception as error:  # json's, and of `tokenizers` a bare Exception
                raise UserError(f"{name}: not readable as a tokenizer: {error}") from None
            first = wanted(path)
            encoder = copy(_prepared(raw, settings.eos_token, settings.pad_token, name, path is None, first))
            encoder.bos = encoder._beginning(settings.bos, file.parent, name)
        if path == "tokenizers":
            encoder.leave_fast_path("as decided for the whole stream")
        return encoder

    def with_control(self, tokens: Sequence[str]) -> "Encoder":
        """The same tokenizer, for which these added tokens are special too."""
        encoder = copy(_prepared(*self._origin, tuple(tokens)))
        encoder.bos = self.bos
        return encoder

    def control_tokens(self) -> ControlTokens:
        """The special tokens, for a template's renderings."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        found = {token.content: ControlToken(id_, token.lstrip, token.rstrip) for id_, token in added if token.special}
        return ControlTokens(found, self.prefix)

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
        """Keep an engine only if it gives the ids of `tokenizers` on `texts`, the head of a stream's source."""
        while self.path != "tokenizers":
            if all(map(np.array_equal, self._encode_texts(texts), self._encode_slowly(texts))):
                self._take(f"{self._why}; the same ids on a sample of {len(texts)} texts")
                return
            spec = json.loads(self.raw)
            spec["model"].pop("dropout", None)
            self._choose(
                NAMES[NAMES.index(self.path) + 1], spec, f"{self.path} gave other ids on a sample of the source"
            )

    def encode(self, documents: Sequence[Document]) -> list[tuple[Array, Array | None]]:
        """For each document its ids [n] with EOS at the end, and for conversations the assistant mask [n] bool.

        A text begins with `bos`; a conversation does not. The mask of one that `starts` is True where it does.
        """
        return [(ids, mask) for ids, mask, _ in self.encode_turns(documents)]

    def encode_turns(self, documents: Sequence[Document]) -> Iterator[tuple[Array, Array | None, list[int]]]:
        """The same, and how many ids there are up to the end of each answer of a conversation."""
        return self.encode_batch(documents).documents()

    def encode_batch(self, documents: Sequence[Document]) -> Encoded:
        """The same in a few arrays; the documents are all texts, or all conversations."""
        bos = () if any(document.assistant for document in documents) else self.bos
        ids = bytearray()  # which grows in place: a long document's ids are in memory once
        lengths: list[Array] = [np.zeros(0, np.int64)]
        for pieces in batched([piece for document in documents for piece in (*bos, *document.pieces, self.eos_id)]):
            some, their_lengths = woven(pieces, *self._encode_pieces([p for p in pieces if isinstance(p, bytes)]))
            ids += some.data
            lengths.append(their_lengths)
        return assembled(documents, len(bos), np.frombuffer(ids, self.dtype), np.concatenate(lengths))

    def encode_served(self, text: str) -> list[int]:
        """The ids of a rendered conversation at inference: special tokens are found in it."""
        self._tokenizer.encode_special_tokens = False
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _encode_pieces(self, texts: Sequence[bytes]) -> Flat:
        """The ids of texts, by whether each goes on with one before it."""
        going = [isinstance(text, GoesOn) for text in texts]
        if self._going_on is self._tokenizer or not any(going):
            return self._encode_batch([text.decode() for text in texts])
        on = copy(self)
        on._engine = Tokenizers(self._going_on)
        begin, rest = (
            encoder._encode_texts([text.decode() for text, goes in zip(texts, going, strict=True) if goes == which])
            for encoder, which in ((self, False), (on, True))
        )
        return joined([next(rest if goes else begin) for goes in going], self.dtype)

    def _encode_batch(self, texts: Sequence[str]) -> Flat:
        ids, ends = self._engine.encode_batch(texts)
        return ids.astype(self.dtype, copy=False), ends

    def _encode_texts(self, texts: Sequence[str]) -> Iterator[Array]:
        """The ids of each text."""
        for batch in batched(texts):
            ids, ends = self._encode_batch(batch)
            yield from (ids[start:end] for start, end in pairwise(ends.tolist()))

    def _encode_slowly(self, texts: Sequence[str]) -> Iterator[Array]:
        slow = copy(self)
        slow._engine = Tokenizers(self._tokenizer)
        return slow._encode_texts(texts)

    def _special(self, key: str, token: str, origin: str) -> int:
        id_ = self.special_ids.get(token)
        if id_ is None:
            names = sorted(self.special_ids)
            some = ", ".join(names[:8]) or "none"
            some += f" and {len(names) - 8} more" if names[8:] else ""
            raise UserError(f"{origin}: tokenizer.{key} {token!r} is not among its added tokens (special: {some})")
        return int(id_)

    def _beginning(self, bos: str, folder: Path, origin: str) -> tuple[int, ...]:
        """What texts begin with by the setting `tokenizer.bos`."""
        ids = [] if bos == "never" else before_text(self._tokenizer)
        if bos == "always" and not ids:
            token = special_token(folder, "bos_token")
            if token not in self.special_ids:
                raise UserError(
                    f"setting `tokenizer.bos: always`: {origin} puts nothing before a text, and "
                    + ("no tokenizer_config.json beside it names a bos_token" if token is None else f"has no {token!r}")
                    + ": name one of its special tokens there as `bos_token`"
                )
            ids = [self.special_ids[token]]
            origin = f"the bos_token of the {special_token_file(folder, 'bos_token')} beside {origin}"
        for id_ in ids:
            token = str(self._tokenizer.id_to_token(id_))
            if id_ in (self.eos_id, self.pad_id) or id_ not in self.special_ids.values():
                does = "ends documents or fills blocks" if id_ in (self.eos_id, self.pad_id) else "is no special token"
                raise UserError(
                    f"setting `tokenizer.bos`: {origin} puts {token!r} before a text, which {does}: set "
                    "`tokenizer.bos: never`, or name other tokens for `eos_token` and `pad_token`"
                )
        return tuple(ids)

    def leave_fast_path(self, reason: str) -> None:
        """Take `tokenizers` from now on."""
        self._engine = Tokenizers(self._tokenizer)
        self._take(reason)

    def _choose(self, first: str, spec: Mapping[str, Any], before: str = "") -> None:
        """Take the first engine from `first` on that gives the ids of `tokenizers`; `before` is why none before is."""
        added = self._tokenizer.get_added_tokens_decoder()
        plain = {token.content: id_ for id_, token in added.items() if not token.special}
        given = Given(spec, self._tokenizer, plain, set(self.special_ids), self._origin[4])
        engine, why = choose(given, first)
        self._engine = engine
        self._take("; ".join(filter(None, (before, why))))

    def _take(self, why: str) -> None:
        self.path, self._why, self.reason = self._engine.name, why, why + self._long


def _of_text_alone(tokenizer_json: str | bytes) -> Any:
    tokenizer: Any = load(tokenizer_json)
    tokenizer.encode_special_tokens = True  # in its words: do not find special tokens, encode their text
    return tokenizer


@lru_cache(maxsize=4)
def _prepared(
    raw: bytes,
    eos_token: str,
    pad_token: str | None,
    origin: str,
    prove: bool,
    engine: str,
    control_tokens: tuple[str, ...] = (),
) -> Encoder:
    return Encoder(raw, eos_token, pad_token, origin, prove, control_tokens, engine)
