"""Where a tokenizer puts a space before a text, and the same tokenizer without it, for text that goes on."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from chimera.convert.encode.equivalence import flat


def prefix_of(spec: Mapping[str, Any]) -> str:
    """Where it puts a space: `none`, `first` (before the first text), `always` (each piece between added tokens)."""
    if any(step["type"] == "Prepend" for step in flat(spec.get("normalizer"))):
        return "always"
    kinds = [_kind(step) for step in flat(spec.get("pre_tokenizer"))]
    return "always" if "always" in kinds else "first" if "first" in kinds else "none"


def _kind(step: Mapping[str, Any]) -> str:
    if step["type"] == "Metaspace":
        return str(step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never"))
    return "always" if step["type"] == "ByteLevel" and step.get("add_prefix_space") else "none"


def without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` in `spec`, changed so that it puts a space before no text."""
    found = deepcopy(dict(spec))
    normalizers = [step for step in flat(found.get("normalizer")) if step["type"] != "Prepend"]
    found["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    steps: list[Any] = [*flat(found.get("pre_tokenizer"))]
    for step in steps:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return found
