"""Entry point: text sources → MDS shards, as `shards.yaml` says. Killed at any moment, the same command goes on."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from chimera.cli import UserError, parse, run, show
from chimera.versions import check_versions

DEFAULT = "yamls/shards.yaml"
EVERY = 5.0  # seconds between two looks of --watch


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="build_shards.py",
        description="Build MDS token shards from hub sets and files; resumes where it stopped.",
        epilog="sample=N shows the first N documents of each stream as they will be trained, and builds nothing",
    )
    parser.add_argument("--status", action="store_true", help="how far the build is, from any terminal; builds nothing")
    parser.add_argument("--watch", action="store_true", help="with --status: again and again, until it is finished")
    parser.add_argument("--json", action="store_true", help="with --status: one JSON object, a line")
    args, path, words = parse(parser, argv, DEFAULT)
    if (args.watch or args.json) and not args.status:
        raise UserError("--watch and --json are for --status")
    overrides = [word for word in words if not word.startswith("sample=")]
    settings = read_build(path, overrides)
    if args.status:
        show_status(settings, args.json, args.watch)
        return 0
    if overrides != words:
        from chimera.convert.build.sample import sample, sample_size

        for line in sample(settings, sample_size(words), sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            print(line)
        return 0
    from chimera.convert.build.executor import disk_trouble

    signal.signal(signal.SIGTERM, _terminated)
    before, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        _build(settings)
    except OSError as error:
        raise disk_trouble(error, settings.work_folder) or error from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    finally:
        sys.unraisablehook = before
    return 0


def show_status(settings: Any, as_json: bool, watch: bool) -> None:
    """Print how far a build is, under `watch` every few seconds until it is finished."""
    from chimera.convert.build.status import StatusReader, lines_of
    from chimera.text import json_text

    reader = StatusReader(settings)
    while True:
        status = reader.read()
        if watch and not as_json and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")
        show(json_text(status.as_json()) if as_json else "\n".join(lines_of(status)))
        if not watch or status.state == "finished":
            return
        sys.stdout.flush()
        time.sleep(EVERY)


def build_shards(config: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Build what a `shards.yaml` says, or go on building it; returns the manifest of the finished output.

    Under `engine: array` it is empty for a process that only helped another.
    Call it below `if __name__ == "__main__":`, as its workers import the calling script anew. A mistake of the user's
    raises `UserError`.
    """
    from chimera.convert.build.executor import disk_trouble

    settings = read_build(Path(config), overrides)
    try:
        manifest = _build(settings)
        return manifest.model_dump() if manifest else {}
    except OSError as error:
        raise disk_trouble(error, settings.work_folder) or error from None


def _build(settings: Any) -> Any:
    from chimera.convert.build.array import build_in_array
    from chimera.convert.build.build import build, executor_for

    return build_in_array(settings) if settings.engine == "array" else build(settings, executor_for(settings))


def read_build(path: Path, overrides: Sequence[str]) -> Any:
    """The checked settings of a build, on libraries of supported versions; raises `UserError`."""
    from chimera.config import load_settings
    from chimera.convert.settings import BuildSettings

    check_versions()
    return load_settings(BuildSettings, path, overrides)


def _terminated(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """Python ignores a Ctrl-C raised inside a finalizer: raise it again."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
    again.daemon = True
    again.start()


def entry() -> None:
    run(main)
