"""When `fastokens` may be taken, and how it is called: by a private name, so for one version alone.

Its special tokens are taken out, so that it finds none in text, and the other added tokens have the ids with which
`tokenizers` loaded them. What it may not be given is refused by name below; the rest `sweep` compares.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import tokenizers

from chimera.convert.encode import sweep
from chimera.convert.encode.equivalence import (
    SPLITS,
    NotEquivalent,
    added_obstacles,
    check_read_alike,
    flat,
    model_obstacles,
)
from chimera.mds import Array

VERSION = "0.3.5"
Encode = Callable[[list[str]], tuple[Array, Array]]

# DeepSeek V3's, which `check_read_alike` does not know; the sweep compares what they are made of
KNOWN = {
    *SPLITS.values(),
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def fastokens_encoder(
    spec: Mapping[str, Any], loaded: Any, plain: Mapping[str, int], special: set[str]
) -> tuple[Encode, str, str]:
    """What encodes a batch, the characters whose texts go to `tokenizers`, and why it may be taken.

    Raises `NotEquivalent` where it may not. See `engines.Given` for the arguments.
    """
    native = native_class()
    for reason in (
        *model_obstacles(spec["model"]),
        *_steps(spec),
        *added_obstacles(spec, plain, special, longest=True),
    ):
        raise NotEquivalent(reason)
    found = [
        {**token, "id": plain[token["content"]]}
        for token in spec.get("added_tokens") or []
        if token["content"] in plain
    ]
    bare = {**spec, "added_tokens": found, "post_processor": None, "truncation": None, "padding": None}
    engine = f"fastokens {VERSION}, tokenizers {tokenizers.__version__}"  # what was compared is kept by
    unsure = sweep.unsure_characters(bare, lambda json_spec: encoder_of(native, json_spec), engine)
    raw = json.dumps(bare)
    encode = encoder_of(native, raw)
    sweep.check_vocabulary(raw, encode, engine, loaded, unsure)
    but = "".join(f", which gets texts with U+{ord(character):04X}" for character in unsure)
    return encode, unsure, f"{VERSION}, all characters and tokens compared with tokenizers{but}"


def native_class() -> Any:
    """The class that encodes; raises `NotEquivalent` where it is not here as known."""
    try:
        version = metadata.version("fastokens")
        from fastokens._native import Tokenizer
    except ImportError:  # PackageNotFoundError is one
        raise NotEquivalent("not installed") from None
    if version != VERSION:
        raise NotEquivalent(f"version {version} is installed, {VERSION} is known")
    if not hasattr(Tokenizer, "encode_batch_flat"):
        raise NotEquivalent("encode_batch_flat is missing")
    return Tokenizer


def _steps(spec: Mapping[str, Any]) -> Iterator[str]:
    """What of normalizer and pre-tokenizer is not sure to be read alike, or is no faster."""
    for step in flat(spec.get("normalizer")):
        if step.get("type") != "NFC":
            yield f"the normalizer is {step.get('type')}"
        if any(token.get("normalized") and not token.get("special") for token in spec.get("added_tokens") or []):
            yield "added tokens are found in normalized text"
    steps = flat(spec.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        yield "the pre-tokenizer does not end in ByteLevel without a prefix space"
    elif last.get("use_regex", True) != (len(steps) == 1):
        yield "the pre-tokenizer is not ByteLevel, alone or after Splits"
    for step in steps[:-1]:
        regex = (step.get("pattern") or {}).get("Regex")
        if step.get("type") != "Split" or not regex or step.get("behavior") != "Isolated" or step.get("invert"):
            yield "the pre-tokenizer is not ByteLevel, alone or after Splits"
        elif regex not in KNOWN:
            check_read_alike(regex)


def encoder_of(native: Any, json_spec: str) -> Encode:
    with _one_cpu():  # at its first calls it starts threads for all CPUs; a worker is to use its own alone
        try:
            tokenizer = native.from_json_str(json_spec)
            tokenizer.encode_batch_flat(["a 1 " * 20_000, *["a 1"] * 2000])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of no class of its own; a panic in Rust is no Exception
            raise NotEquivalent(f"it does not read the tokenizer ({error})") from None

    def encode(texts: list[str]) -> tuple[Array, Array]:
        ids, ends = tokenizer.encode_batch_flat(texts)
        return np.frombuffer(ids, "<u4"), np.frombuffer(ends, "<u8").astype(np.int64)

    return encode


@contextmanager
def _one_cpu() -> Iterator[None]:
    """Let this thread run on one CPU alone for a moment, as far as the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
