"""When and how `tiktoken` gives the ids that `tokenizers` gives, about five times faster.

tiktoken merges the neighbors whose joined bytes are the entry of the lowest id; `tokenizers` those whose merge comes
first in its list; of equal ones both take the leftmost. They agree when every entry is one byte or made by a merge,
the ids of the merges' entries never decrease along the list and belong to one entry each, and `tokenizers` makes each
entry of its own bytes. By induction over the steps: let both have come to the same tokens, and let two neighbors
join to entry v. No step has merged across either end of v's bytes, so the steps between them were those that
`tokenizers` takes on v alone; these end in v, so the two neighbors are what is there before the last of them. Hence
their merge is listed, and every place that joins to v has the same one. So both choose among the same places, by an
order that is the same, and take the same. A pre-token that is an entry, which tiktoken takes as it stands, is what
`tokenizers` makes of it. (Llama 3's list has a merge for every split of an entry; of these the last steps matter.)

The rest of the proof is about what surrounds the merges: normalizer, pre-tokenizer, and how added tokens are found in
the text.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import regex
import tiktoken
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Digits

from chimera.convert.encode.texts import CUT_CHARACTERS

if TYPE_CHECKING:
    from tiktoken import Encoding

# GPT-2's pre-tokenizer as `ByteLevel` has it:
#   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# regrouped so that all but the look-ahead is one group, which the regex engine runs as an automaton (1.5 times as
# fast). `\s+(?!\S)` fails only on a single white-space character, so what is left for the last `\s+` is one.
BYTE_LEVEL = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"

# `Digits` cuts out every number character first (the tokenizers of StarCoder and SmolLM): none joins its neighbors,
# and white space before one is as at the end of the text. Which characters those are, `_numbers` says.
_DIGITS = {"type": "Digits", "individual_digits": True}
_DIGITS_THEN_BYTE_LEVEL = r"(?:[NUM]|'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|[^\s\p{L}NUM]+))|\s+(?![^\sNUM])|\s"

# The regexes that tokenizers in use give a `Split`.
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_FIRST, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _one_case(digits: str) -> str:
    return "|".join((_ENGLISH, _FIRST + r"\p{L}+", digits, r" ?[^\s\p{L}\p{N}]+[\r\n]*", _SPACES))


def _two_cases(digits: str, ending: str) -> str:
    words = (f"{_FIRST}{_UPPER}*{_LOWER}+{ending}", f"{_FIRST}{_UPPER}+{_LOWER}*{ending}")
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))


SPLITS = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": _one_case(r"\p{N}{1,3}"),
    "Qwen 2": _one_case(r"\p{N}"),
    "o200k": _two_cases(r"\p{N}{1,3}", f"{_ENGLISH}?"),
    "Tekken": _two_cases(r"\p{N}", ""),
}

# What of a `Split`'s regex both engines (Oniguruma as Ruby has it, fancy-regex) read alike: alternatives of single
# characters, classes without classes in them, and these once quantified. Not `\w`, `.`, `^`, `{1,3}+` and the like;
# nor letters that one of them folds into one character (ß, ﬅ, ﬀ, ﬁ, ﬂ), groups repeated (which may match nothing),
# or look-aheads with groups in them (in a second look-ahead, the whole could match nothing in the midst of a text).
_ESCAPE = r"\\[pP]\{\w+\}|\\[rntsSd]|\\[^\w\s]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|(?!--|&&|~~)[^\\\[\]])+\]"
_FOLDED = r"(?:\[[a-z']{2,}\]|(?![a-z']*(?:ss|st|ff|f[il]))[a-z']+)"
_SET = rf"(?:{_ESCAPE}|{_CLASS}|\(\?i:{_FOLDED}(?:\|{_FOLDED})*\)|[^\\\[\](){{}}*+?.^$|])"
_ONE = rf"(?:{_SET}(?:[?*+]|\{{\d+(?:,\d*)?\}})?(?![?*+{{])|\|)"
_COMMON = re.compile(rf"(?:{_ONE}|\(\?!{_ONE}+\)(?![?*+{{])|\(\?:|\)\??(?![?*+{{]))+")


class NotEquivalent(Exception):
    """Why a tokenizer cannot take the fast path."""


def _encoding(pattern: str, ranks: dict[bytes, int], words: Mapping[str, int]) -> "Encoding":
    # Without any, tiktoken 0.14.0 looks for the empty word at every byte, which doubles its time. A word that callers
    # do not allow is not taken for one.
    words = words or {"\0": max(ranks.values()) + 1}
    return tiktoken.Encoding("chimera", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(words))


def tiktoken_encoding(spec: Mapping[str, Any], plain: Mapping[str, int], special: set[str], loaded: Any) -> "Encoding":
    """The `tokenizer.json` in `spec` as a tiktoken encoding; raises `NotEquivalent` where equality is not proven.

    `plain` are the added tokens to be found in text with their ids, `special` those never to be found there.
    `loaded` is the model as `tokenizers` loaded it; without one, that merges yield their tokens is taken as proven.
    """
    model = spec["model"]
    for reason in (*model_obstacles(model), *added_obstacles(spec, plain, special, longest=False)):
        raise NotEquivalent(reason)
    pattern = _pattern(spec)
    made = _made(model)
    whole = _whole(model, made, {*plain, *special}) if model.get("ignore_merges") else ()
    if whole:  # such a model takes any entry as it stands, tiktoken only those with a rank
        raise NotEquivalent(f"token {min(whole)!r} is taken whole, though no merge makes it")
    if loaded is not None:
        _prove(model, made, loaded)
    character_bytes = {ord(character): byte for byte, character in byte_characters().items()}
    ranks = {token.translate(character_bytes).encode("latin-1"): id_ for token, id_ in made.items()}
    return _encoding(pattern, ranks, plain)


def model_obstacles(model: Mapping[str, Any]) -> Iterator[str]:
    """What in a model keeps every engine but `tokenizers` from taking it."""
    if model_type(model) != "BPE":
        yield f"the model is {model_type(model)}, not BPE"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            yield f"the model sets {key}"


def added_obstacles(
    spec: Mapping[str, Any], plain: Mapping[str, int], special: set[str], longest: bool
) -> Iterator[str]:
    """Which of the added tokens `plain` an engine may find elsewhere; `longest`: it takes the longest of several."""
    tokens = [token for token in spec.get("added_tokens") or [] if token["content"] in plain]
    for token in tokens:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                yield f"added token {token['content']!r} sets {flag}"
    if len({bool(token.get("normalized")) for token in tokens}) > 1:
        yield "added tokens are found in two passes (normalized and not)"
    words = sorted(plain)
    for word, after in pairwise(words):
        # `tokenizers` takes the longest match at a place, tiktoken the first of its alternatives
        if not longest and after.startswith(word):
            yield f"added token {word!r} is the start of {after!r}"
    for text in sorted(special):
        # `tokenizers` steps over the text of a special token, with whatever begins inside it
        if word := next(filter(None, (_begun_in(text[i:], words, plain) for i in range(len(text)))), ""):
            yield f"the text of special token {text!r} overlaps added token {word!r}"


def _begun_in(tail: str, words: Sequence[str], plain: Mapping[str, int]) -> str:
    """One of the sorted `words` that begins with `tail`, or with which `tail` begins; else nothing."""
    at = bisect_left(words, tail)
    if at < len(words) and words[at].startswith(tail):
        return words[at]
    return next((tail[:end] for end in range(1, len(tail)) if tail[:end] in plain), "")


def _pattern(spec: Mapping[str, Any]) -> str:
    """The regex that cuts text into pre-tokens."""
    if normalizers := flat(spec.get("normalizer")):
        raise NotEquivalent(f"the normalizer is {', '.join(str(one.get('type')) for one in normalizers)}")
    steps = flat(spec.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise NotEquivalent("the pre-tokenizer does not end in ByteLevel without a prefix space")
    if len(steps) == 1 and last.get("use_regex", True):
        return BYTE_LEVEL
    split = steps[0]
    if len(steps) == 2 and split == _DIGITS and last.get("use_regex", True):
        return _DIGITS_THEN_BYTE_LEVEL.replace("NUM", _numbers())
    regex = (split.get("pattern") or {}).get("Regex")
    simple = split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) == 2 and split.get("type") == "Split" and regex and simple and not last.get("use_regex", True):
        check_read_alike(regex)
        return _with_gaps(regex)
    raise NotEquivalent("the pre-tokenizer is not ByteLevel, alone or after one Split or Digits")


@cache
def _numbers() -> str:
    """The characters that `Digits` cuts out, to stand in a class of tiktoken's regex.

    `Digits` asks Rust's tables and tiktoken's `\\p{N}` those of its regex engine: `tokenizers` 0.23 knows 13 numbers of
    Unicode 17 more. Raises `NotEquivalent` where it knows fewer.
    """
    letters = "x".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))))
    pieces = Digits(individual_digits=True).pre_tokenize_str(letters)  # all but numbers stay after an x
    cut_out = {piece for piece, _ in pieces if len(piece) == 1} - {"x", "\0"}
    bytes_only = {bytes([byte]): byte for byte in range(256)}

    def found(pattern: str) -> set[str]:
        ids = _encoding(pattern, bytes_only, {}).encode_to_numpy(letters, disallowed_special=())
        return set(ids.astype("uint8").tobytes().decode())

    known = found(r"\p{N}")
    more = cut_out - known
    if known - cut_out or (more and more - found(r"[^\s\p{L}\p{N}]")):
        raise NotEquivalent("the two libraries disagree on which characters are numbers")
    return r"\p{N}" + "".join(sorted(more))


def _with_gaps(regex: str) -> str:
    """What tiktoken must match: text between matches is a pre-token to `tokenizers`; tiktoken would drop it."""
    return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"


def same_in_pieces(spec: Mapping[str, Any]) -> bool:
    """Whether a text that `texts.chunks` cuts at a place of its choice is sure to have the ids of the whole.

    So it is with the pre-tokenizers known here: a run of letters or digits ends before each of
    `texts.CUT_CHARACTERS`, and what begins there is matched as at the beginning of a text. Added words are found in
    each piece as in the whole if none has such a character within, or takes the white space around it.
    """
    normalizers = [one for one in flat(spec.get("normalizer")) if one.get("type") != "NFC"]  # joins no two of these
    try:
        pattern = _pattern({**spec, "normalizer": {"type": "Sequence", "normalizers": normalizers}})
    except NotEquivalent:
        return False
    added = spec.get("added_tokens") or []
    apart = not any(set(CUT_CHARACTERS).intersection(token["content"][1:]) for token in added)
    bare = not any(token.get("lstrip") or token.get("rstrip") for token in added if not token["special"])
    digits = flat(spec["pre_tokenizer"])[0] == _DIGITS
    return (digits or pattern in (BYTE_LEVEL, *map(_with_gaps, SPLITS.values()))) and apart and bare


def check_read_alike(regex: str) -> None:
    """Raise `NotEquivalent` for a `Split`'s regex that engines may read otherwise, or that matches nothing."""
    if not _COMMON.fullmatch(regex):
        raise NotEquivalent("the two libraries may read the pre-tokenizer's regex differently")
    if _matches_nothing(regex):
        raise NotEquivalent("the pre-tokenizer's regex matches the empty text")


def _matches_nothing(pattern: str) -> bool:
    """Whether a pattern of `_COMMON` may match no character: then it does so at the end of a text."""
    try:
        return regex.fullmatch(pattern, "") is not None
    except regex.error:
        raise NotEquivalent("the pre-tokenizer's regex is not understood") from None


def _made(model: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of every byte and merge, in the order of ids as far as merges make them."""
    vocab: Mapping[str, int] = model["vocab"]
    alphabet = byte_characters().values()
    if not all(character in vocab for character in alphabet):
        raise NotEquivalent("the vocabulary lacks some of the 256 bytes")
    made = {character: vocab[character] for character in alphabet}
    latest = -1
    for merge in model["merges"]:
        token = merged(merge)
        if token not in vocab or vocab[token] < latest:
            raise NotEquivalent(f"the id of {token!r} does not follow the order of merges")
        latest = made[token] = vocab[token]
    if len(set(made.values())) < len(made):
        raise NotEquivalent("two tokens have one id")
    return made


def _whole(model: Mapping[str, Any], made: Mapping[str, int], added: set[str]) -> set[str]:
    """The entries that text can hold, of no merge, and not the text of an added token, which is none of the model's."""
    characters = byte_characters()
    alphabet = set(characters.values())
    spelled = {"".join(characters[byte] for byte in word.encode()) for word in added}
    return {token for token in model["vocab"].keys() - made.keys() - spelled if alphabet.issuperset(token)}


def _prove(model: Mapping[str, Any], made: Mapping[str, int], loaded: Any) -> None:
    """That merging the bytes of each token yields it."""
    if model.get("ignore_merges"):  # such a model takes a whole token without merging
        plain = {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]}
        loaded = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": plain})).model
    for token, id_ in made.items():
        if [piece.id for piece in loaded.tokenize(token)] != [id_]:
            raise NotEquivalent(f"merging the bytes of token {token!r} does not yield it")


def model_type(model: Mapping[str, Any]) -> str | None:
    """What the model is; old files don't say."""
    return model.get("type", "BPE" if "merges" in model else None)


def merged(merge: str | list[str]) -> str:
    """The token that an entry of `merges` makes."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def flat(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, in order."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part.get("pretokenizers", part.get("normalizers")) for step in flat(inner)]


@cache
def byte_characters() -> Mapping[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return MappingProxyType({b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)})


@lru_cache(maxsize=2)
def same_character_classes(pattern: str) -> bool:
    """Whether both libraries' regex engines agree, for every character, on the classes that `pattern` names.

    Their Unicode tables come from different sources and may differ between versions. All assigned characters lie in
    planes 0 to 3 and the first of plane 14; above are private ones.
    """
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))))
    names = {rf"\p{name}" for name in re.findall(r"\\[pP](\{\w+\})", pattern)}
    for name in sorted({r"\s", *names, *([r"\d"] if r"\d" in pattern else [])}):
        try:
            theirs, ours = Replace(Regex(f"[^{name}]+"), ""), _encoding(f"{name}+", bytes_only, {})
        except Exception:  # one of them does not know the class; `tokenizers` raises no kind of its own
            return False
        ids = ours.encode_to_numpy(text, disallowed_special=())
        if theirs.normalize_str(text).encode() != ids.astype("uint8").tobytes():
            return False
    return True
