"""What of a base's files differs in an export's: compared file by file and key by key, so that none is left unsaid."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chimera.text import code

MOST = 60  # characters of a value that is shown


def differences(base: Mapping[str, bytes], folder: Path) -> list[str]:
    """A line of Markdown for each file whose values are not the base's; weights aside.

    Args:
        base: its files by their paths.
        folder: of the export, without its card.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    ours = {name: path.read_bytes() for name, path in paths.items() if "safetensors" not in name}
    lines = []
    for name in sorted(base.keys() | ours.keys()):
        if name not in base or name not in ours:
            lines.append(f"{code(name)}: {'added' if name in ours else 'left out'}")
        elif ours[name] != base[name] and (words := _differ(base[name], ours[name])):
            lines.append(f"{code(name)}: {words}")
    return lines


def _differ(base: bytes, ours: bytes) -> str:
    """What differs of two versions of a file; empty where both are JSON of the same values."""
    try:
        was, now = json.loads(base), json.loads(ours)
    except (ValueError, RecursionError):
        return "changed"
    if not isinstance(was, dict) or not isinstance(now, dict):
        return "changed" if was != now else ""
    parts = {
        "added": [code(key) for key in now.keys() - was.keys()],
        "left out": [code(key) for key in was.keys() - now.keys()],
        "changed": [_change(key, was[key], now[key]) for key in was.keys() & now.keys() if was[key] != now[key]],
    }
    return "; ".join(f"{what} {', '.join(sorted(keys))}" for what, keys in parts.items() if keys)


def _change(key: str, was: Any, now: Any) -> str:
    """A key, with both of its values where they are short."""
    shown = [json.dumps(value, ensure_ascii=False) for value in (now, was)]
    if max(map(len, shown)) > MOST:
        return code(key)
    return f"{code(key)} ({code(shown[0])}, was {code(shown[1])})"
