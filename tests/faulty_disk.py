"""A disk that fails: a library, preloaded into a process, whose calls on files below a folder give an error."""

import errno
import random
import shutil
import subprocess
from pathlib import Path

import pytest

# The kinds of calls, and what the system may answer to each.
ERRORS = {
    "open": ("EIO", "EACCES", "EROFS", "ESTALE", "EMFILE", "ENOSPC"),
    "read": ("EIO", "ESTALE"),
    "write truncate": ("EIO", "ENOSPC", "EDQUOT", "ESTALE"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename unlink mkdir": ("EIO", "EACCES", "EROFS", "ENOSPC", "ESTALE"),
}


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
    calls = rng.choice([*ERRORS])
    return {
        "LD_PRELOAD": str(library),
        "FAULT_ROOT": str(root),
        "FAULT_CALLS": calls,
        "FAULT_ERRNO": str(getattr(errno, rng.choice(ERRORS[calls]))),
        "FAULT_AT": str(int(2 ** rng.uniform(0, 9))),
        "FAULT_LOG": f"{root}.faults",
        **({"FAULT_ALWAYS": "1"} if rng.random() < 0.5 else {}),
    }
