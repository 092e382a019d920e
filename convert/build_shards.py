"""Entry point: text sources → MDS shards, as `shards.yaml` says. Killed at any moment, the same command goes on."""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.cli import UserError, load_settings, parse, run, say
from chimera.stack import check_stack

DEFAULT = "yamls/shards.yaml"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="build_shards.py", description="Build MDS token shards from hub sets and files; resumes where it stopped."
    )
    _, path, overrides = parse(parser, argv, DEFAULT)
    from convert.engine import disk_trouble
    from convert.settings import BuildSettings, check

    check_stack()
    settings = load_settings(BuildSettings, path, overrides)
    check(settings)
    signal.signal(signal.SIGTERM, _terminated)
    before, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        build(settings)
    except OSError as error:
        raise disk_trouble(error, settings.work_folder) or error from None
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise
    finally:
        sys.unraisablehook = before
    return 0


def _terminated(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """A Ctrl-C in the midst of a generator's or an object's end, where Python would pass over it, comes once more."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
    again.daemon = True
    again.start()


def build(settings: Any) -> None:
    """Plan, convert, publish: each resumable, all under the lock of the output."""
    from convert import journal, planning
    from convert.dispatch import Dispatcher
    from convert.encoding import Encoder
    from convert.engine import make_engine
    from convert.outputs import open_output
    from convert.planned import load_plan
    from convert.publish import publish

    work = settings.work_folder
    digest = Encoder.from_settings(settings.tokenizer).digest
    output = open_output(settings)
    if not settings.remote and not work.exists() and planning.finished(settings, output, digest):
        return  # which needs no permission to write there
    with output.held() as alone, journal.lock_of(work) as free:
        if not (alone and free):
            raise UserError(f"another builder is writing {settings.output}: wait for it or stop it")
        try:
            if planning.finished(settings, output, digest):
                if (work / "plan.json").exists():
                    output.release()
                journal.empty(work)
                return
            plan = planning.current_plan(settings, work, output, digest)
        except BaseException:
            if not (work / "plan.json").exists():
                journal.empty(work)  # nothing has begun
            raise
        output.claim(work, settings.rebuild)
        plan = planning.cleared(plan, work, output)
        planned = load_plan(work)
        engine = make_engine(settings, work)
        try:
            dispatcher = Dispatcher(planned.streams, work, output.can_discard, settings.stall_after)
            parts = dispatcher.run(engine)
        finally:
            engine.close()
        manifest = publish(plan, planned, parts, work, output)
        journal.empty(work)
    for name, stream in manifest["streams"].items():
        say(f"{name}: {_summary(stream, settings.streams[name].max_tokens)}")


def _summary(stream: dict[str, Any], limit: int | None) -> str:
    """What became of a stream's rows, from its part of the manifest."""
    rows, train = stream["rows"], stream["train"]
    dropped = [
        f"{kind}: {', '.join(f'{count} {reason}' for reason, count in rows[kind].items())}"
        for kind in ("filtered", "rejected")
        if rows[kind]
    ]
    reasons = f" ({'; '.join(dropped)})" if dropped else ""
    short = f", all there are (max_tokens: {limit})" if limit and train["tokens"] < limit else ""
    return (
        f"{rows['documents']} documents of {rows['read']} rows{reasons}; to train on: {train['tokens']} tokens in "
        f"{train['blocks']} blocks{short}"
    )


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
