"""The wheel: built, installed elsewhere, its commands run outside of the checkout."""

import configparser
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """The console scripts setup.cfg declares."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].split("\n")
    return [line.split("=")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel alone, which sees this one's packages behind its own; its folder."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"  # setuptools writes beside what it builds
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    names = files.stdout.decode().split("\0") if files.returncode == 0 else []
    for name in filter(None, names):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    if not names:
        pytest.skip("no git checkout")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = str(folder / "wheels")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, str(source)], check=True)
    (wheel,) = (folder / "wheels").glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    behind = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "behind.pth").write_text(f"{behind}\n")
    return folder


def run(installed: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [installed / "env/bin" / words[0], *words[1:]],
        cwd=cwd or installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_holds_the_library_alone(installed: Path) -> None:
    """A package called `train` or `convert` would be taken for, or hide, a file of the user's."""
    done = run(installed, "python", "-c", "import chimera; print(chimera.__file__)")
    (site,) = (installed / "env/lib").glob("python*/site-packages")
    assert done.stdout.strip() == str(site / "chimera/__init__.py")
    names = {path.name for path in site.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert names == {"chimera"}


def test_commands_run_beside_files_of_the_users_with_their_names(installed: Path, tmp_path: Path) -> None:
    for name in ("train.py", "convert.py", "plan.py"):
        (tmp_path / name).write_text("raise SystemExit('the user's own file was run')\n")
    for words in (
        ["chimera-build-shards", "none.yaml"],
        ["chimera-plan", "none.yaml"],
        ["composer", "-n", "1", "-m", "chimera.train", "none.yaml"],
    ):
        if words[0] == "composer":  # of the environment behind, run by the one in front
            words = ["python", "-m", "composer.cli.launcher", *words[1:]]
        done = run(installed, *words, cwd=tmp_path)
        assert done.returncode, done.stdout
        assert "error: no config file at none.yaml" in done.stdout + done.stderr


@pytest.mark.parametrize("command", commands())
def test_commands_answer_outside_of_the_checkout(installed: Path, command: str) -> None:
    done = run(installed, command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("command", commands())
def test_help_imports_nothing_heavy(installed: Path, command: str) -> None:
    done = run(installed, "python", "-X", "importtime", f"env/bin/{command}", "--help")
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert loaded.isdisjoint({"torch", "transformers", "streaming", "composer", "datasets", "pyarrow", "ray"})


def test_a_wheels_command_builds_and_plans(installed: Path) -> None:
    """A config in another folder, its shards built and planned by the commands."""
    (installed / "shards.yaml").write_text(
        "output: shards\ntokenizer: {path: tokenizer}\nblock_len: 64\nworkers: 1\n"
        f"streams: {{it: {{sources: [{{files: ['{ROOT}/samples/it_pages.parquet']}}]}}}}\n"
    )
    (installed / "train.yaml").write_text(
        "shards: shards\nglobal_train_batch_size: 2\nphases: [{name: one, steps: 3, proportions: {it: 1}}]\n"
        "curriculum: {stages: [{from_step: 0, seq_len: 64}]}\n"
    )
    for words in (
        ["chimera-train-tokenizer", "shards.yaml", "vocab_size=500"],
        ["chimera-build-shards", "shards.yaml"],
        ["chimera-verify-shards", "shards"],
        ["chimera-plan", "train.yaml"],
        ["chimera-inspect-batch", "train.yaml", "step=2", "--decode"],
    ):
        done = run(installed, *words)
        assert done.returncode == 0, done.stderr
    assert "step 2: phase one, sequences of 64 tokens, 2 blocks" in done.stdout
