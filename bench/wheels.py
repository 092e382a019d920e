"""What the train wing needs beside torch, numpy and transformers, as wheels: for machines that reach no registry."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chimera.text import size

ROOT = Path(__file__).resolve().parents[1]


def collect(folder: Path, python: str) -> str:
    """Download what `wheels.txt` names, as wheels for a Python version; returns a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["--requirement", str(ROOT / "bench/wheels.txt"), "--constraint", str(ROOT / "constraints.txt")]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    _pip("download", *options, *names)
    wheels = list(folder.glob("*.whl"))
    return f"{folder}: {len(wheels)} wheels, {size(sum(wheel.stat().st_size for wheel in wheels))}"


def install(wheels: Path, target: Path) -> list[str]:
    """Install into the folder `target` those wheels whose package this Python does not have; returns their names."""
    chosen = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _installed(wheel.name.split("-")[0])]
    target.mkdir(parents=True, exist_ok=True)
    if chosen:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        _pip("install", *options, *map(str, chosen))
    if importlib.util.find_spec("torchvision") is None:
        (target / "torchvision").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "bench/no_torchvision.py", target / "torchvision/__init__.py")
    return [wheel.name.split("-")[0] for wheel in chosen]


def _installed(package: str) -> bool:
    try:
        version(re.sub(r"[_.]+", "-", package))
    except PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)
