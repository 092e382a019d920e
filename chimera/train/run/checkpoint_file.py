"""A checkpoint's file, read without trusting it.

Only tensors and plain values are unpickled; what the file claims is compared with what it holds before memory is taken
for it; and what is read of it has the types that `train/main.py` writes.
"""

import errno
import io
import pickle
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct
from torch.storage import _get_dtype_from_pickle_storage_type
from torch.torch_version import TorchVersion

from chimera.cli import UserError
from chimera.text import one_line
from chimera.train.run.checkpoint_schema import what_differs

ZIP = b"PK\x03\x04"


class _Damaged(ValueError):
    """A file that claims more than it holds."""


def read_checkpoint(path: Path, lazy: bool = False) -> dict[str, Any]:
    """The `state` of one of our checkpoints, on the CPU; only tensors and plain values are unpickled.

    `lazy`: a tensor's bytes are read where they are used, so the file must stay as it is until then; its checksums are
    the caller's to compare (`check_sums`).
    """
    # What Composer keeps beside the tensors: random states, durations, torch's version. A base's file may be empty.
    plain: list[Any] = [_reconstruct, numpy.ndarray, numpy.dtype, numpy.dtypes.UInt32DType, timedelta, TorchVersion]
    plain += [(_no_bytes, "builtins.bytes"), (_no_bytes, "__builtin__.bytes")]
    try:
        check_claims(path)
        if not lazy:
            check_sums(path)
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)["state"]
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (MemoryError, UserError):
        raise
    except pickle.UnpicklingError:  # whose text advises to load it without the check
        raise UserError(
            f"{path} is not a checkpoint that can be read: it is damaged, or holds more than tensors and plain values"
        ) from None
    except Exception as error:  # of many kinds, by what the file holds
        raise UserError(
            f"{path} is not a checkpoint that can be read: {one_line(error)[:200] or type(error).__name__}"
        ) from None
    callbacks = dict(state.get("callbacks") or {}) if isinstance(state, dict) else {}
    if "About" not in callbacks:
        raise UserError(f"{path} was not written by train/main.py: it lacks the model's description")
    if difference := what_differs(state):
        raise UserError(f"{path} was not written by train/main.py, or is damaged: {difference}")
    return {**state, "callbacks": callbacks}


def damage_of(path: Path | str) -> str | None:
    """What is wrong with a checkpoint file, None if nothing: its zip directory and every checksum are read.

    Raises `UserError` where the system does not let it be read: whole or not, a run must not begin before it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            return f"checksum of {broken}" if broken else None
    except Exception as error:  # a damaged directory can raise nearly anything
        refused = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL)  # a wrong offset
        if refused or isinstance(error, MemoryError):
            raise UserError(
                f"checkpoint {path} cannot be read ({one_line(error) or type(error).__name__}), which says nothing "
                "about whether it is whole: make it readable, or move it elsewhere to start from the one before"
            ) from None
        return str(error) or type(error).__name__


def check_sums(path: Path) -> None:
    """Raise `UserError` where a checkpoint is damaged: torch compares no checksum when it reads one."""
    if path.is_file() and (damage := damage_of(path)):
        raise UserError(f"{path} is not a checkpoint that can be read: it is damaged ({one_line(damage)[:200]})")


def _no_bytes() -> bytes:
    """How pickle writes b"". In place of `bytes`, which would make as many as it is told."""
    return b""


def check_claims(path: Path) -> None:
    """Raise `ValueError` where a checkpoint claims more bytes than its file holds: compressed, or as a tensor's.

    torch 2.7 reads behind the end of a record that is shorter than its tensor.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        if file.read(4) != ZIP:  # where torch looks: a file of another kind, with an archive behind it
            raise _Damaged("it does not begin as an archive of torch does")
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if len(sizes) < len(archive.infolist()):
            raise _Damaged("it holds two parts of one name")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if packed or sum(sizes.values()) > path.stat().st_size:
            raise _Damaged("its parts are larger than the file")
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Damaged("it holds no `data.pkl`")
        claims = _Claims(io.BytesIO(archive.read(pickles[0])))
        claims.load()
    root = pickles[0].removesuffix("data.pkl")
    for key, size in claims.found.items():
        if sizes.get(f"{root}data/{key}", -1) < size:
            raise _Damaged(f"a tensor of {size} bytes is not there")


class _Claims(pickle._Unpickler):
    """Finds the storages that a pickle names, and their bytes; nothing that it names is called or made.

    Python's own `Unpickler`, as that in C takes memory by the largest number a pickle gives to a value.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        name = kind.__name__
        bytes_each = 1 if name == "UntypedStorage" else _get_dtype_from_pickle_storage_type(name).itemsize
        size = count * bytes_each
        self.found[str(key)] = max(size, self.found.get(str(key), 0))
        return _Nothing()


class _Nothing:
    """Stands for whatever a pickle would make."""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass
