"""The command line all tools share: one-line errors, YAML with overrides, progress on any terminal.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TextIO, TypeVar, cast, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")


class UserError(Exception):
    """Something only the user can mend; the message says what is wrong, where, and the remedy."""


FULL = (errno.ENOSPC, errno.EDQUOT)  # these may name no file
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, *FULL)


def fail(message: str) -> NoReturn:
    """Print `message` as one line on stderr and exit with 2."""
    say(f"error: {one_line(message)}")
    raise SystemExit(2)


def one_line(message: object) -> str:
    """`message` with every run of whitespace made one space."""
    return re.sub(r"\s+", " ", str(message)).strip()


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
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout) or _nobody_reads(sys.stderr):
            raise  # another pipe broke, or that of messages too: the work may not be done
        # `… | head`: the reader has had enough of our results, which is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in REFUSED or (error.filename is None and error.errno not in FULL):
            raise
        fail(f"{error.filename or 'what was being written'}: {error.strerror}: give another place, or mend this one")
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


def load_settings(schema: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, the `base:` files it names and `key=value` overrides into the dataclass `schema`.

    A `base` is relative to the file that names it; later values win, lists are replaced whole. An unknown key
    or a wrong type raises `UserError` naming the key.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = ""  # the entry of a list that is looked at, which OmegaConf's errors do not name
    try:
        config = _read_yaml(path)
        for override in overrides:
            key, _, text = override.partition("=")
            try:
                parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
                value = parsed["value"]
                OmegaConf.update(config, key, value, merge=not isinstance(value, list))
            except (yaml.YAMLError, AttributeError, IndexError, TypeError, ValueError) as error:
                raise UserError(f"override `{override}`: {str(error).splitlines()[0]}") from None
        values = OmegaConf.to_container(config)
        places = list(_places(schema, values))
        for key, kind, value in places:
            if _misread(kind, value):
                raise UserError(
                    f"{path}: setting `{key}`: YAML reads {value!r} where a text is wanted: put it in quotes"
                )
            if wanted := _several(kind, value):
                raise UserError(f"{path}: setting `{key}`: {value!r} stands where {wanted} is wanted")
        for where, kind, value in places:
            if is_dataclass(kind) and isinstance(value, dict) and where.rpartition(".")[2].isdigit():
                OmegaConf.merge(OmegaConf.structured(kind), value)
        where = ""
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        key = ".".join(filter(None, [where, getattr(error, "full_key", None)])) or "?"
        key = re.sub(r"\[(\d+)\]", r".\1", key)  # as overrides are written
        reason = str(getattr(error, "msg", None) or error).split("\n")[0]
        raise UserError(f"{path}: setting `{key}`: {reason}") from None
    except TypeError:  # OmegaConf's, which does not say where
        key = _of_another_kind(OmegaConf.structured(schema), config)
        raise UserError(f"{path}: setting `{key}` holds a list for a mapping, or a mapping for a list") from None
    return cast(Settings, settings)


def _places(kind: Any, value: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place of a config with its key, the type wanted there and what it holds, nested ones after theirs."""
    yield key, kind, value
    inner: list[tuple[Any, Any, Any]] = []
    if is_dataclass(kind) and isinstance(value, dict):
        inner = [(name, wanted, value.get(name)) for name, wanted in get_type_hints(kind).items()]
    elif get_origin(kind) is dict and isinstance(value, dict):
        inner = [(name, get_args(kind)[1], held) for name, held in value.items()]
    elif get_origin(kind) is list and isinstance(value, list):
        inner = [(place, get_args(kind)[0], held) for place, held in enumerate(value)]
    for name, wanted, held in inner:
        yield from _places(wanted, held, f"{key}.{name}".lstrip("."))


def _misread(kind: Any, value: Any) -> bool:
    """Whether YAML has read a text as something else: `no` as False, `2024_10` as 202410."""
    texts = kind is str or (get_origin(kind) is UnionType and str in get_args(kind))
    return texts and isinstance(value, (bool, int, float))


def _several(kind: Any, value: Any) -> str | None:
    """What is wanted, if a list or mapping is and `value` is a single one: `files: a.jsonl`, `tokenizer: path`."""
    listed = get_origin(kind) is list
    single = isinstance(value, (str, bool, int, float)) and not (isinstance(value, str) and "${" in value)
    if single and (listed or get_origin(kind) is dict or is_dataclass(kind)):  # `${…}` may refer to several
        return f"a list, [{value}]," if listed else "a mapping, {key: value},"
    return None


def _of_another_kind(onto: Any, config: Any) -> str:
    """The first key of `config` that cannot be merged into `onto`."""
    from omegaconf import OmegaConf

    for key in config:
        try:
            OmegaConf.merge(onto, OmegaConf.masked_copy(config, [key]))
        except TypeError:
            return str(key)
    return "?"


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """One YAML file merged onto its `base`, as an OmegaConf node."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if path.resolve() in seen:
        raise UserError(f"{path}: `base` leads back to itself")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no config file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a mapping of settings is expected")
    base = config.pop("base", None)
    if base is None:
        return config
    below = _read_yaml(path.parent / str(base), (*seen, path.resolve()))
    try:
        return OmegaConf.merge(below, config)
    except TypeError:
        key = _of_another_kind(below, config)
        raise UserError(f"{path}: setting `{key}` holds a list for a mapping, or a mapping for a list") from None


def progress(total: float | None, unit: str, label: str, initial: float = 0, disable: bool = False) -> Any:
    """A tqdm bar on stderr with rate and ETA; without a terminal plain lines, at most one in ten seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=label,
        unit_scale=True,
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


def counted(count: int, what: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def say(message: str) -> None:
    """One line of what a tool does, on stderr, clear of a progress bar (stdout is for results).

    A message that cannot be written (its pipe is closed, as by `… 2>&1 | head`, or its disk full) stops no work.
    """
    with suppress(OSError):
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)
