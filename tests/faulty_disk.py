"""A disk that fails: a library, preloaded into a process, whose calls on files below a folder give an error."""

import errno
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "ESTALE", "EMFILE")
CALLS = ("open", "read", "write", "fsync", "rename unlink mkdir truncate")


def compiled(folder: Path) -> Path:
    """The library, made from its source; the test is skipped where no C compiler is."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    library = folder / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def environment(library: Path, root: Path, rng: random.Random) -> dict[str, str]:
    """Variables by which the n-th call of one kind on files below `root` fails, once in a process or from then on."""
    return {
        "LD_PRELOAD": str(library),
        "FAULT_ROOT": str(root),
        "FAULT_CALLS": rng.choice(CALLS),
        "FAULT_ERRNO": str(getattr(errno, rng.choice(ERRORS))),
        "FAULT_AT": str(int(2 ** rng.uniform(0, 9))),
        "FAULT_LOG": f"{root}.faults",
        **({"FAULT_ALWAYS": "1"} if rng.random() < 0.5 else {}),
    }
