"""The command line all tools share: one-line errors, arguments, progress on any terminal.

A mistake of the user's is a `UserError`: it is printed as one line and the process exits with 2. Anything
else is a defect of ours and keeps its traceback.
"""

import argparse
import errno
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from chimera.text import neutral, one_line, without_passwords


class UserError(Exception):
    """Something only the user can fix; the message says what is wrong, where, and the remedy."""


# What the system says of files and disks that a user can fix; the first two kinds may name no file.
FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EIO, errno.ESTALE, errno.EROFS)  # the disk, or the server that it is on
REFUSED = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE,
    errno.ENFILE, errno.ENOLCK, *BROKEN, *FULL,
)  # fmt: skip


def fail(message: str) -> NoReturn:
    """Print `message` as one line on stderr and exit with 2."""
    say(f"error: {message}")
    raise SystemExit(2)


def parse_bytes(text: str | int | float, setting: str) -> int:
    """`200gb`, `64 MB`, `1048576` → bytes, in powers of 1024. Raises `UserError` that names the setting."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", str(text).strip().lower())
    if match is None:
        raise UserError(f"setting `{setting}` is {text!r}: write bytes, or e.g. 200gb")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry point: `UserError`, or a file the system refuses, is one line and exit code 2.

    Ctrl-C exits with 130.
    """
    _prepare_streams()
    code: int | None = None
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a closed pipe is caught
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as stop:  # which may say more
        say(f"stopped{'; ' if stop.args else ''}{' '.join(map(str, stop.args))}")
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout) or _nobody_reads(sys.stderr):
            raise  # another pipe broke, or that of messages too: the work may not be done
        # `… | head`: the reader has had enough of our results, which is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in REFUSED or (error.filename is None and error.errno not in (*BROKEN, *FULL)):
            raise
        fail(f"{error.filename or 'what was being written'}: {error.strerror}: give another place, or fix this one")
    raise SystemExit(code or 0)


def _prepare_streams() -> None:
    """Give closed standard streams (`2>&-`) to /dev/null; else the next file to be opened takes their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (open for as long as the process lives)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a locale without a character ends nothing
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python prints it, but neutral: what it says may quote anybody's text."""
    sys.stderr.write(neutral(without_passwords("".join(traceback.format_exception(kind, error, trace)))))


def _nobody_reads(stream: TextIO) -> bool:
    """Whether `stream` is a pipe whose other end is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # no event asked for: errors are always reported
    except (OSError, ValueError):  # it has no file descriptor
        return False
    return bool(poll.poll(0))


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], default_config: str | None
) -> tuple[argparse.Namespace, Path, list[str]]:
    """Split `[CONFIG] [key=value ...] [flags]` into (flags, config path, overrides).

    The first positional without `=` is the config; without one `default_config` is used.
    """
    default = f" (default: {default_config})" if default_config else ""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=f"YAML file{default}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, e.g. a.0.b=10")
    args = parser.parse_intermixed_args(list(argv))
    words = [w for w in [args.config, *args.overrides] if w is not None]
    configs = [w for w in words if "=" not in w]
    if len(configs) > 1:
        raise UserError(f"more than one config file: {' and '.join(configs)} (overrides are key=value)")
    if not configs and default_config is None:
        raise UserError(f"no config file given: usage: {parser.prog} CONFIG [key=value ...]")
    return args, Path(configs[0] if configs else str(default_config)), [w for w in words if "=" in w]


def progress(total: float | None, unit: str, label: str, initial: float = 0, disable: bool = False) -> Any:
    """A tqdm bar on stderr with rate and ETA; without a terminal plain lines, at most one in ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=label,
        unit_scale=total is None or total >= 1000,  # of few parts: 3/4, and not 3.00/4.00
        dynamic_ncols=terminal,
        ascii=not terminal,
        mininterval=0.2 if terminal else 10,
        file=sys.stderr if terminal else _Lines(),
        disable=disable,
        smoothing=0.05,
    )


class _Lines:
    """A stream for tqdm that turns carriage returns into lines (for logs)."""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip("\r\n ")
        if text:
            with suppress(OSError):  # as in `say`
                print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def show(text: str) -> None:
    """Results on stdout, in lines of their own; made `neutral`, as they may quote data."""
    print(neutral(text))


def say(message: str) -> None:
    """One line of what a tool does, on stderr, clear of a progress bar (stdout is for results).

    A message that cannot be written (its pipe is closed, as by `… 2>&1 | head`, or its disk full) stops no work.
    """
    message = one_line(message)  # it may quote data
    with suppress(OSError):
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)
