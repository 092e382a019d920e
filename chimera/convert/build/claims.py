"""Who builds which streams of an output, so that builders on several machines can work on one output.

`.claims/STREAM` in the output stands for a stream that is being built, from before its plan until the manifest names
it. It holds its builder's terms: what all streams of an output have in common. In a folder it is locked by its builder
(`flock`), so that one that a kill left is free; all that happens to claims does so under `.claims/.lock`, as does the
merge of a manifest. In a store a claim is created on condition that there is none, and holds its builder's name (see
`store_output`).
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from chimera.cli import UserError, say
from chimera.convert.encode.encoding import Encoder
from chimera.convert.settings import CLAIMS, BuildSettings, differences, identity
from chimera.files import lock_file
from chimera.mds import Json

_LOCK = ".lock"  # no stream has a dot in its name


def terms_of(settings: BuildSettings, encoder: Encoder) -> Json:
    """What the streams of an output have in common: settings, the tokenizer by its digest, what texts begin with."""
    shaping = {key: value for key, value in identity(settings).items() if key != "streams"}
    texts = any(stream.format == "text" for stream in settings.streams.values())
    return {"settings": shaping, "tokenizer": encoder.digest[:12], "bos": list(encoder.bos) if texts else None}


def check_terms(output: str, stream: str, theirs: Any, mine: Json) -> None:
    """Raise `UserError` where the builder of another stream of `output` has other terms than these."""
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("bos") is None or mine["bos"] is None:  # no texts
        theirs, mine = {**theirs, "bos": None}, {**mine, "bos": None}
    theirs = {key: theirs.get(key) for key in mine}  # what a later version adds is not ours to compare
    if found := differences(theirs, mine):
        raise UserError(
            f"another builder is writing {stream} of {output} with other settings ({'; '.join(found[:5])}): choose "
            "another `output`, or take the change back"
        )


def just_changed(output: str) -> UserError:
    """What to say where another builder changed the output between two looks at it."""
    return UserError(f"another builder has just changed {output}: run the same command again")


@contextmanager
def claimed(root: Path, streams: Iterable[str], terms: Json) -> Iterator[None]:
    """Hold the claims of `streams` in a folder. Raises `UserError` where another builder holds one, or differs."""
    names = sorted(streams)
    with ExitStack() as held:
        with alone(root) as locks:
            if locks:
                _take(root, names, terms, held)
            else:
                say(f"{root}: its file system keeps no locks: let one builder at a time write there")
        try:
            yield
        finally:
            with alone(root):
                _give_up(root, names)


def _take(root: Path, names: list[str], terms: Json, held: ExitStack) -> None:
    folder, taken = root / CLAIMS, list[str]()
    try:
        for name in names:
            if not held.enter_context(lock_file(folder / name, wait=False)):
                raise UserError(
                    f"another builder is writing {name} of {root}: wait for it or stop it, or build other streams "
                    "meanwhile (`only`)"
                )
            taken.append(name)
        for file in folder.iterdir():
            if file.name in names or file.name == _LOCK:
                continue
            with lock_file(file, wait=False) as free:
                if free:  # a kill left it
                    file.unlink()
                else:
                    check_terms(str(root), file.name, json.loads(file.read_bytes()), terms)
        for name in names:
            (folder / name).write_text(json.dumps({**terms, "host": os.uname().nodename}))
    except BaseException:
        _give_up(root, taken)
        raise


def _give_up(root: Path, names: list[str]) -> None:
    for name in names:
        (root / CLAIMS / name).unlink(missing_ok=True)


@contextmanager
def alone(root: Path) -> Iterator[bool]:
    """Keep others from changing claims and manifest of the output in a folder, once those that do have ended.

    Yields False on a file system without locks, where nobody is kept out.
    """
    folder, locks = root / CLAIMS, True
    with ExitStack() as held:
        ours = False
        while not ours:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                ours = held.enter_context(lock_file(folder / _LOCK, wait=True))
            except FileNotFoundError:  # the last builder has just removed the folder
                continue
            except OSError as error:
                if error.errno != errno.ENOLCK:
                    raise
                ours, locks = True, False
        try:
            yield locks
        finally:
            if [file.name for file in folder.iterdir()] == [_LOCK]:
                (folder / _LOCK).unlink()
                with suppress(OSError):  # the next one has made a lock there
                    folder.rmdir()
