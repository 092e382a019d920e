"""What turns texts into ids: `fastokens`, `tiktoken` or `tokenizers`, in this order where each gives the same ids.

`tokenizers` says what the ids are. The others are taken for a tokenizer only where they are shown to give the same:
`tiktoken` by the argument in `equivalence`, `fastokens` by what `sweep` compares. A text that an engine gives up on,
or is known to read otherwise, goes to `tokenizers`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from chimera.cli import UserError
from chimera.convert.encode.equivalence import NotEquivalent, same_character_classes, tiktoken_encoding
from chimera.convert.encode.fastokens_engine import fastokens_encoder
from chimera.mds import Array

if TYPE_CHECKING:
    from tiktoken import Encoding

NAMES = ("fastokens", "tiktoken", "tokenizers")
VARIABLE = "CHIMERA_ENCODER"  # the first that is tried; the manifest says which was taken
Flat = tuple[Array, Array]  # ids of all texts [n], where each begins and the last ends [texts + 1]


class Engine(Protocol):
    """Texts to ids, special tokens being plain text."""

    name: str
    said: str  # why it may be taken

    def encode_batch(self, texts: Sequence[str]) -> Flat:
        """The ids of the texts, one after another, in any unsigned type, and their ends."""


@dataclass(frozen=True)
class Given:
    """What an engine is made of: a `tokenizer.json`, and the same as `tokenizers` loaded it.

    `plain` are the added tokens to be found in text with their ids, `special` those never to be found there.
    Without `prove`, what is proven of the engine tried first is trusted: another process has chosen it.
    """

    spec: Mapping[str, Any]
    loaded: Any
    plain: Mapping[str, int]
    special: set[str]
    prove: bool


class Tokenizers:
    """`tokenizers` itself."""

    name, said = "tokenizers", "asked for"

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def encode_batch(self, texts: Sequence[str]) -> Flat:
        found = self._loaded.encode_batch_fast(list(texts), add_special_tokens=False)
        return joined([np.array(encoding.ids, dtype=np.uint32) for encoding in found])


class Tiktoken:
    """`tiktoken`; what its regex engine gives up on goes to `tokenizers`."""

    name, said = "tiktoken", "same merges and pre-tokens"

    def __init__(self, encoding: "Encoding", words: set[str], slow: Tokenizers) -> None:
        self.encoding, self._words, self._slow = encoding, words, slow

    def encode_batch(self, texts: Sequence[str]) -> Flat:
        return joined([self._encode(text) for text in texts])

    def _encode(self, text: str) -> Array:
        try:
            return self.encoding.encode_to_numpy(text, allowed_special=self._words, disallowed_special=())
        except ValueError:  # the regex engine's back-tracking limit
            return self._slow.encode_batch([text])[0]


class Fastokens:
    """`fastokens`; texts that hold one of `unsure`, and what it gives up on, go to `tokenizers`."""

    name = "fastokens"

    def __init__(self, encode: Callable[[list[str]], Flat], unsure: str, said: str, slow: Tokenizers) -> None:
        self._encode, self._unsure, self.said, self._slow = encode, unsure, said, slow

    def encode_batch(self, texts: Sequence[str]) -> Flat:
        if not any(character in text for character in self._unsure for text in texts):
            try:
                return self._encode(list(texts))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # a panic in Rust is no Exception
                if len(texts) == 1:
                    return self._slow.encode_batch(texts)
        elif len(texts) == 1:
            return self._slow.encode_batch(texts)
        return joined([self.encode_batch([text])[0] for text in texts])


def joined(parts: Sequence[Array], dtype: DTypeLike = np.uint32) -> Flat:
    """Arrays one after another."""
    ends = np.cumsum([0, *map(len, parts)])
    return (np.concatenate(parts) if parts else np.zeros(0, dtype)), ends


def wanted(planned: str | None = None) -> str:
    """The engine to try first: what a build was planned with, else what the environment says, else the fastest."""
    name = planned or os.environ.get(VARIABLE) or NAMES[0]
    if name not in NAMES:
        raise UserError(
            f"environment variable {VARIABLE}: {name!r} is none of {', '.join(NAMES)}: name one, or unset it"
        )
    return name


def choose(given: Given, first: str) -> tuple[Engine, str]:
    """The first engine from `first` on that gives the ids of `tokenizers`, and why it is taken and others are not."""
    why: list[str] = []
    for name in NAMES[NAMES.index(first) :]:
        try:
            engine = _MAKERS[name](replace(given, prove=given.prove or name != first))
        except NotEquivalent as error:
            why.append(f"{name}: {error}")
        else:
            return engine, "; ".join([*([] if why and name == "tokenizers" else [engine.said]), *why])
    raise AssertionError("tokenizers is always taken")


def _tiktoken(given: Given) -> Engine:
    loaded = given.loaded.model if given.prove else None
    encoding = tiktoken_encoding(given.spec, given.plain, given.special, loaded)
    if given.prove and not same_character_classes(encoding._pat_str):
        raise NotEquivalent("the two libraries' Unicode tables differ")
    return Tiktoken(encoding, set(given.plain), Tokenizers(given.loaded))


def _fastokens(given: Given) -> Engine:
    encode, unsure, said = fastokens_encoder(given.spec, given.loaded, given.plain, given.special)
    return Fastokens(encode, unsure, said, Tokenizers(given.loaded))


_MAKERS: Mapping[str, Callable[[Given], Engine]] = {
    "fastokens": _fastokens,
    "tiktoken": _tiktoken,
    "tokenizers": lambda given: Tokenizers(given.loaded),
}
