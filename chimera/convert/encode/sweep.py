"""Whether an engine reads text as `tokenizers` does: every character, what stands beside it, every token.

Ids hide most cuts between pre-tokens, as merges across them are rare. So the characters are compared with another
model behind the same normalizer and pre-tokenizer: its tokens are all pairs of bytes, those that join two characters
first. There each cut is seen in the ids, whatever the vocabulary.

What is found is kept in the user's cache folder by the versions of both libraries: it takes seconds of CPU.
"""

import hashlib
import json
import os
import platform
import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from chimera.convert.encode.equivalence import NotEquivalent, byte_characters, flat
from chimera.files import open_whole
from chimera.mds import Array
from chimera.tokenizer_file import load

Flat = tuple[Array, Array]
Encode = Callable[[list[str]], Flat]
Make = Callable[[str], Encode]

VERSION = 1  # of what is compared
CHARACTERS = (range(1, 0x3000), range(0x3000, 0xD800), range(0xE000, 0x110000))  # documents hold no NUL
_MOST_UNSURE = 16
_BATCH = 16

# One of each kind that pre-tokenizers ask for: letters, marks, numbers, punctuation, symbols, spaces, elisions.
KINDS = ["a", "Z", "s", "ǅ", "ʰ", "ª", "漢", "é", "\u0301", "\u0903", "\u20dd", "1", "٣", "Ⅷ", "²", "'", "’", ".", "-"]
KINDS += [
    "'s",
    "'t",
    "'m",
    "'d",
    "'LL",
    "'re",
    "'vE",
    "_",
    "(",
    "»",
    "/",
    "$",
    "^",
    "©",
    "😀",
    "\u200d",
    "\ufe0f",
    "\xad",
]
KINDS += [" ", "  ", "\t", "\n", "\r\n", "\r", "\v", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f"]
KINDS += ["\u3000", "\u200b", "\ufeff", "ſ", "\u212a", "ß", "\x7f", "\ue000", "\u0378"]


def unsure_characters(spec: Mapping[str, Any], make: Make, engine: str) -> str:
    """The characters beside which an engine cuts text, or normalizes it, otherwise than `tokenizers`.

    `make` makes the engine of a `tokenizer.json`; `engine` names it with its version and that of `tokenizers`.
    Raises `NotEquivalent` where they are too many, or kinds of characters beside each other are read otherwise.
    """
    parts = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}

    def compare() -> str:
        seeing = json.dumps({"version": "1.0", "added_tokens": [], "model": _pairs_of_bytes(), **parts})
        theirs, ours = load(seeing), make(seeing)
        normalized = bool(flat(spec.get("normalizer")))
        found = ""
        for groups in zip_longest(*[_groups()] * _BATCH, fillvalue=[]):
            differ = _differing(theirs, ours, [_text(group, normalized) for group in groups])
            for group in (group for group, other in zip(groups, differ, strict=True) if other):
                found += "".join(c for c in group if any(_differing(theirs, ours, [_text([c], normalized)])))
                rest = _text([c for c in group if c not in found], normalized)
                if len(found) > _MOST_UNSURE or any(_differing(theirs, ours, [rest])):
                    first, last = (f"U+{ord(c):04X}" for c in (min(group), max(group)))
                    raise NotEquivalent(f"it reads characters from {first} to {last} otherwise")
        kinds = [kind for kind in KINDS if not set(kind).intersection(found)]
        for first in kinds:
            text = "".join(first + "".join(two) for two in product(kinds, repeat=2))
            if any(_differing(theirs, ours, [text])):
                raise NotEquivalent(f"it cuts text otherwise beside {first!r}")
        return found

    return _kept(f"characters {json.dumps(parts, sort_keys=True)}", engine, compare)


def check_vocabulary(raw: str, encode: Encode, engine: str, loaded: Any, unsure: str) -> None:
    """Raise `NotEquivalent` where a token's text, alone or joined to others, has other ids than by `tokenizers`.

    `raw` is the `tokenizer.json` that the engine was given, `unsure` are the characters whose texts it is not given.
    """

    def compare() -> str:
        spec = json.loads(raw)
        characters = {character: byte for byte, character in byte_characters().items()}
        spelled = [token for token in sorted(spec["model"]["vocab"]) if set(token) <= characters.keys()]
        tokens = [bytes(characters[each] for each in token).decode(errors="ignore") for token in spelled]
        words = [token["content"] for token in spec["added_tokens"]]
        draw = random.Random(0)  # the same on each machine
        tokens += draw.choices(words, k=min(len(words), len(tokens) // 10))
        tokens = [token for token in tokens if not set(token).intersection(unsure)]
        texts = ["\n".join(tokens), "a".join(tokens), " ".join(tokens)]
        draw.shuffle(tokens)
        texts += ["".join(tokens), " ".join(map("".join, pairwise(tokens)))]
        runs = [token.strip() for token in tokens if token.strip().isalpha()]
        texts += ["".join(draw.choices(runs, k=count)) for count in (10, 30, 100, 300, 1000, 3000) if runs]
        if any(_differing(loaded, encode, texts)):
            raise NotEquivalent("it gives other ids to tokens of the vocabulary")
        return ""

    _kept(f"vocabulary {raw}", engine, compare)


def _groups() -> Iterator[list[str]]:
    for characters in CHARACTERS:
        for start in range(characters.start, characters.stop, 512):
            yield [chr(c) for c in range(start, min(start + 512, characters.stop))]


def _text(group: Sequence[str], normalized: bool) -> str:
    """Characters as letters, numbers, spaces, marks and the like stand beside them."""
    if not group:
        return ""
    first = ord(group[0])
    if first < 0x3000:
        found = "".join(f"xa{c}b  {c}{c} 1{c}23'{c}a.{c}\n{c}" for c in group)
    elif first < 0x20000 or first >> 12 == 0xE0:
        found = "".join(f"a{c}b {c}1{c}.{c}{c}" for c in group)
    elif first < 0x40000:  # ideographs
        found = "".join(f"a{c} {c}1" for c in group)
    else:  # private, or of no Unicode yet
        found = "x" + "".join(group)
    if normalized:
        found += "".join(f"{c}{unicodedata.normalize('NFD', c)}{c}\u0301\u0323{c}\u0327" for c in group)
    return found


def _differing(theirs: Any, ours: Encode, texts: list[str]) -> Iterator[bool]:
    """For each text, whether its ids differ."""
    try:
        ids, ends = ours(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in Rust is no Exception
        yield from (True for _ in texts)
        return
    for i, encoding in enumerate(theirs.encode_batch_fast(texts, add_special_tokens=False)):
        yield not np.array_equal(encoding.ids, ids[ends[i] : ends[i + 1]])


def _pairs_of_bytes() -> Mapping[str, Any]:
    """A model of all bytes and pairs of bytes, those merged first that end one character and begin the next."""

    def rank(pair: tuple[int, ...]) -> tuple[bool, bool, tuple[int, ...]]:
        left, right = pair
        inside = 0x80 <= right < 0xC0  # within a character
        return inside, left < 0x80 and right < 0x80, pair

    character = byte_characters()
    merges = [[character[a], character[b]] for a, b in sorted(product(range(256), repeat=2), key=rank)]
    names = [*character.values(), *map("".join, merges)]
    return {"type": "BPE", "vocab": {name: id_ for id_, name in enumerate(names)}, "merges": merges}


def _kept(what: str, engine: str, compare: Callable[[], str]) -> str:
    """What `compare` found, kept on disk, a reason not to take the engine too; without the disk it is found again."""
    key = f"{VERSION} {engine} {platform.machine()} {unicodedata.unidata_version} {what}"
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache_home / "chimera" / "engines" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        kept = json.loads(file.read_bytes())
        found, reason = str(kept["unsure"]), str(kept["reason"])
    except (OSError, ValueError, LookupError, TypeError):
        reason = found = ""
        try:
            found = compare()
        except NotEquivalent as error:
            reason = str(error)
        _keep(file, {"engine": engine, "unsure": found, "reason": reason})
    if reason:
        raise NotEquivalent(reason)
    return found


def _keep(file: Path, value: Mapping[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(file, "nothing", file.with_name(f".{file.name}.{os.getpid()}")) as out:
            out.write(json.dumps(value).encode())
    except OSError:
        pass
