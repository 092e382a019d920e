"""Rows of Hugging Face hub sets: `datasets` resolves a set to its files, of which only the needed columns are fetched.

The revision is resolved to a commit once, so every part of the build and every rerun reads the same files. A part is
one file of the set; inside it rows are counted, and after a failure reading starts again after the last row given
out. All waiting is done here, bounded and with what the server asks for (`Retry-After`): the retries of `datasets`,
which can sleep for half an hour, are set to one, and those of the hub's client to none.

Files are read from the hub's file system, parquet as local files are, and not by the scanners behind `load_dataset(...,
streaming=True)`: those take several times the memory (apache/arrow#39808, huggingface/datasets#7269), read a file from
its beginning each time, and give up where waiting would do (huggingface/datasets#7440). `bench/hub.py` shows it on the
pinned versions; the rows are the same ones (`test_hub.py`).
"""

import errno
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import LocalEntryNotFoundError
from yaml import YAMLError

from chimera.cli import UserError
from chimera.convert.read.cannot_open import CannotOpen
from chimera.convert.read.columns import check_columns
from chimera.convert.read.range_file import RangeFile
from chimera.convert.read.readers import reader_of
from chimera.convert.read.reading import Position, Row, Span, Wanted, kind_of
from chimera.convert.stream_settings import SourceSettings
from chimera.limits import Limits
from chimera.mds import Json
from chimera.retries import OPENING, Retries
from chimera.text import counted, one_line
from chimera.versions import without_retries_of_the_hubs_client

_BUFFER = 1 << 20  # bytes
_CARDS = {"README.md", ".huggingface.yaml"}  # where a set's subsets, splits and readers' options are named
_HARMLESS = {"features", "columns", "batch_size", "chunksize"}  # options that do not change the rows

Result = TypeVar("Result")


def open_hub(where: str, source: SourceSettings, column: Wanted, limits: Limits) -> tuple[Json, list[Span]]:
    """What the manifest says of a hub set, and one span for each file of its split.

    Raises `CannotOpen` when the set is missing, gated for us or out of reach after `limits.retries` attempts, and
    `UserError` when it is there without the subset, split or column asked for.
    """
    assert source.hub is not None
    name = source.hub
    if os.path.exists(name):  # which `datasets` would read in the set's place
        raise UserError(
            f"{where}: {name}: a folder of that name in {os.getcwd()} stands in the way of the hub's set: run from "
            "another folder, or rename it"
        )
    attempts = min(limits.retries, OPENING)
    sha, sizes, builder, files = _attempts(lambda: _resolve(where, source), name, attempts)
    _check_options(f"{where}: {name}", builder.config)
    spans = [
        Span("hub", file, 0, None, sizes.get(_path_in_set(file), 0), _delimiter(file, builder.config)) for file in files
    ]
    for span in spans:
        reader_of(span.file)  # not to find after a night that the last of them cannot be read
    _attempts(lambda: _probe(where, name, spans[0], column, limits), name, attempts)
    describe = {"hub": name, "subset": source.subset, "split": source.split, "revision": sha}
    folder = {"data_dir": source.data_dir} if source.data_dir else {}
    return {**describe, **folder, "format": builder.name, "data_files": len(files)}, spans


def rows_of_hub(span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """Rows of one file of a set from `start` on. Raises `UserError` after `limits.retries` failures in a row."""
    position, retries = start, Retries(span.file, limits.retries, _is_transient, _say)
    while True:
        try:
            for row in _rows(span, column, position, limits):
                position, retries.failures = row.after, 0
                yield row
            return
        except UserError:  # of this file's kind or columns
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # of the folder that Arrow files are fetched to
            if not retries.wait(error):
                raise UserError(
                    f"{span.file} fails at row {position.number} after {counted(retries.failures, 'attempt')}: "
                    f"{_say(error)}: run the same command again later; it goes on where it stopped"
                ) from None


def _rows(span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The rows after `start`."""
    with HubFile(span.file) as below:
        file: io.BufferedReader = io.BufferedReader(below, _BUFFER)
        yield from reader_of(span.file).rows(file, span, column, start, limits)


def _resolve(where: str, source: SourceSettings) -> tuple[str, dict[str, int], Any, list[str]]:
    """(commit, size of each file, the builder `datasets` has for the set, the split's files)."""
    assert source.hub is not None
    info = HfApi().dataset_info(source.hub, revision=source.revision)
    sha = info.sha
    for card in _CARDS.intersection(file.rfilename for file in info.siblings or ()):
        # From here on in its cache: `datasets` (4.8) takes a card it cannot reach for one that is not there.
        HfApi().hf_hub_download(source.hub, card, revision=sha, repo_type="dataset")
    library = _library()
    try:
        builder = library.load_dataset_builder(source.hub, source.subset, data_dir=source.data_dir, revision=sha)
    except LocalEntryNotFoundError:  # a `ValueError` too, but the hub is out of reach
        raise
    except ValueError as error:  # datasets' word for an unknown or missing subset; it lists those there are
        raise UserError(f"{where}: {source.hub}: subset {source.subset!r}: {one_line(error)}") from None
    except (RuntimeError, YAMLError, library.data_files.EmptyDatasetError) as error:  # scripts alone, a broken card
        if source.data_dir and isinstance(error, library.data_files.EmptyDatasetError):
            raise UserError(f"{where}: {source.hub} has no data files below `{source.data_dir}`") from None
        raise CannotOpen(one_line(error)) from None
    found = builder.config.data_files or {}
    if source.split not in found:
        raise UserError(f"{where}: {source.hub} has no split `{source.split}`; it has {', '.join(found) or 'none'}")
    files = [str(file) for file in found[source.split]]
    paths = [_path_in_set(file) for file in files]
    infos = [
        i
        for at in range(0, len(paths), 500)
        for i in HfApi().get_paths_info(source.hub, paths[at : at + 500], revision=sha, repo_type="dataset")
    ]
    return str(sha), {i.path: getattr(i, "size", 0) for i in infos}, builder, files


def files_of_clone(where: str, folder: str) -> list[str]:
    """The files of the `train` split of a hub set that lies in a folder, as `datasets` finds them.

    Raises `UserError` where its card names several subsets, no such split, or another way to read its files.
    """
    library = _library()
    named = f"give its files as globs, say {folder}/data/*.parquet"
    try:
        config = library.load_dataset_builder(folder).config
    except (ValueError, RuntimeError, YAMLError, FileNotFoundError) as error:  # (no data files: one of the last)
        raise UserError(f"{where}: {folder}: a set of the hub, but {one_line(error)}: {named}") from None
    found = config.data_files or {}
    if "train" not in found:
        raise UserError(f"{where}: {folder} has no split `train`; it has {', '.join(found) or 'none'}: {named}")
    files = [str(file) for file in found["train"]]
    _check_options(f"{where}: {folder}", config)
    if any(_delimiter(file, config) != _delimiter(file, None) for file in files):
        raise UserError(f"{where}: {folder}: its card names a delimiter for its files: {named}")
    return files


def _probe(where: str, name: str, span: Span, column: Wanted, limits: Limits) -> None:
    """Read the head of a file, so that gating or a missing column is found before the work begins."""
    if names := reader_of(span.file).names:
        with HubFile(span.file) as below:
            file: io.BufferedReader = io.BufferedReader(below, _BUFFER)
            check_columns(f"{where}: {name}", names(span.file, file, limits), column)
    else:
        next(_rows(span, column, Position(), limits), None)


def _delimiter(file: str, config: Any) -> str:
    """The delimiter of a CSV file: what its set's card says, or its format's where the set counts as of another."""
    return str(getattr(config, "sep", "\t" if kind_of(file) == ".tsv" else ","))


def _check_options(where: str, config: Any) -> None:
    """Raise `UserError` where a set's card wants its files read so that other rows come than our readers give."""
    known = {field.name for field in fields(_library().BuilderConfig)} | _HARMLESS | {"sep", "delimiter"}
    usual = type(config)()
    asked = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in known}
    other = {name: value for name, value in asked.items() if value != getattr(usual, name)}
    if len(delimiter := _delimiter("", config)) != 1:
        other["sep"] = delimiter
    if other:
        raise UserError(
            f"{where}: its card has its files read with {', '.join(f'{k}: {v!r}' for k, v in other.items())}, which "
            "is not supported: load it with `datasets`, write it as parquet and give that as `files`"
        )


def _path_in_set(file: str) -> str:
    """`path` of `hf://datasets/OWNER/NAME@COMMIT/path` (or NAME@COMMIT/path for a set without an owner)."""
    return file.partition("@")[2].partition("/")[2]


@functools.cache
def _library() -> Any:
    """The `datasets` library, without its import of torch (seconds a worker), leaving all waiting to this module."""
    before = os.environ.get("USE_TORCH")
    os.environ["USE_TORCH"] = before or "0"
    try:
        import datasets
        from datasets import config
        from datasets.utils import logging
    finally:  # `transformers` reads it too, later and in processes of this one's
        if before is None:
            del os.environ["USE_TORCH"]

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    logging.set_verbosity(logging.CRITICAL)  # its "retrying" lines would name waits that do not happen
    without_retries_of_the_hubs_client()
    return datasets


# Failures


def _attempts(act: Callable[[], Result], name: str, attempts: int) -> Result:
    """The result of `act`, tried up to `attempts` times; `CannotOpen` when it does not come."""
    retries = Retries(name, attempts, _is_transient, _say)
    while True:
        try:
            return act()
        except (UserError, CannotOpen):
            raise
        except Exception as error:
            if not _is_transient(error):
                raise CannotOpen(_say(error)) from None
            if not retries.wait(error):
                raise CannotOpen(f"out of reach after {retries.failures} attempts: {_say(error)}") from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    """The server's answer behind an exception, or `None`."""
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: everything but a clear no."""
    response = _response(error)
    if response is not None and 400 <= response.status_code < 500:
        return response.status_code in (408, 429)
    missing = _library().exceptions
    return not isinstance(error, (missing.DatasetNotFoundError, missing.DataFilesNotFoundError))


def _say(error: Exception) -> str:
    """An error in one line, without the signed query of an address."""
    response = _response(error)
    if response is not None and response.status_code in (401, 403) and "gated" in str(error).lower():
        return "it is gated: accept its terms on the hub and log in (`hf auth login`, or HF_TOKEN)"
    said = re.sub(r"\?[^\s'\")]*", "?…", one_line(error) or type(error).__name__)
    system = re.search(r"\[Errno -?\d+\] [^'\")]+", said)
    if response is None and system:
        return f"no connection: {system.group()}"
    return re.sub(r"\(Request ID: [^)]*\)", "", said)[:300].strip()


class HubFile(RangeFile):
    """The file at `path` (`hf://datasets/OWNER/NAME@COMMIT/…`). Reading raises what the hub's client does."""

    def __init__(self, path: str) -> None:
        file = HfFileSystem().open(path, "rb", cache_type="none")

        def read(begin: int, end: int) -> bytes:
            file.seek(begin)
            data: bytes = file.read(end - begin)
            return data

        super().__init__(int(file.size), read)
