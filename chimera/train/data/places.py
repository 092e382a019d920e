"""Which root each stream of a run is in: setting `shards` is one root, a list of roots, or a root for each stream.

Where a stream is decides nothing of the order: that follows from its name, its index and the plan.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chimera.cli import UserError
from chimera.manifest import Manifest
from chimera.train.data.shards import fetch, read_manifest

NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a stream
Places = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Root:
    """One shards root; `manifest` and its SHA-256 are None where there is none: shards made by others, or none yet."""

    place: str
    manifest: Manifest | None
    digest: str | None


def places_of(shards: Places) -> list[str]:
    """The roots of a setting `shards`, each once."""
    named = shards.values() if isinstance(shards, Mapping) else [shards] if isinstance(shards, str) else shards
    return list(dict.fromkeys(named))


def shown(shards: Places) -> str:
    """The roots of a setting `shards`, for messages."""
    return " and ".join(places_of(shards))


class Roots:
    """The roots of a setting `shards`; each manifest is read once."""

    def __init__(self, shards: Places, cache: str) -> None:
        self.shards, self.cache = shards, cache
        self._roots = {}
        for place in places_of(shards):
            manifest, digest = read_manifest(place, cache) or (None, None)
            self._roots[place] = Root(place, manifest, digest)

    def __iter__(self) -> Iterator[Root]:
        return iter(self._roots.values())

    def __str__(self) -> str:
        return shown(self.shards)

    def holds(self, root: Root, stream: str) -> bool:
        """Whether a stream is in a root: by its manifest, else by its index."""
        if root.manifest is not None:
            return stream in root.manifest.streams
        names = (f"{stream}/train/index.json", f"{stream}/index.json") if NAME.fullmatch(stream) else ()
        return any(fetch(root.place, name, self.cache) is not None for name in names)

    def locate(self, streams: Iterable[str]) -> dict[str, Root]:
        """The root of each of `streams`; empty where a list of roots holds nothing at all yet.

        Raises `UserError` for a stream that is in two roots of a list, or in none, or that a mapping does not name.
        """
        streams = list(streams)
        if isinstance(self.shards, str):
            return dict.fromkeys(streams, self._roots[self.shards])
        if isinstance(self.shards, Mapping):
            if missing := [name for name in streams if name not in self.shards]:
                raise UserError(
                    f"setting `shards` names no root for stream `{missing[0]}` (it has {', '.join(self.shards)}): add "
                    f"`shards.{missing[0]}`, or correct the name"
                )
            return {name: self._roots[self.shards[name]] for name in streams}
        found: dict[str, Root] = {}
        for root in self:
            for name in root.manifest.streams if root.manifest else [n for n in streams if self.holds(root, n)]:
                if name in found:
                    raise UserError(
                        f"stream `{name}` is in two roots of `shards`, {found[name].place} and {root.place}: give "
                        f"`shards` as a mapping of each stream to its root, {{{name}: {root.place}, ...}}"
                    )
                found[name] = root
        if found and (missing := [name for name in streams if name not in found]):
            bare = [root.place for root in self if root.manifest is None and root not in found.values()]
            none = f" (no shards at {' and '.join(bare)}: no manifest.json there, and none of these streams)"
            raise UserError(
                f"stream `{missing[0]}` is in none of the roots of `shards`, {self}{none if bare else ''}: correct the "
                "name, add its root, or build it"
            )
        return {name: found[name] for name in streams if name in found}

    def empty(self, found: Mapping[str, Root]) -> bool:
        """Whether no root has a manifest and none of the streams `found` (`locate`) is there: nothing is built yet."""
        return not any(root.manifest for root in self) and not any(self.holds(r, name) for name, r in found.items())
