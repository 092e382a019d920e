"""Every command of README.md and docs/ is run, in order, in a copy of the checkout, and every Python block as a file.

What follows a `print` as a comment is a line that the block prints.

A block marked ```sh no-run``` needs a cluster, a hub, credentials or hours: of these, shell syntax, files, settings
and option names are checked, and nothing is run. `composer` commands run as they stand on the small models the pages
use; of README's, which trains the demo's, the first steps.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import zstandard

import chimera
from chimera import manifest
from chimera.convert.build.status import STATES, BuildStatus
from chimera.convert.build.stream_status import StreamStatus
from docs import site_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GO_ON = ("other-data.md", "own-chat.md", "continue-pretraining.md", "preemptible.md")
IN_A_ROW = ("own-data.md", "resume.md", *GO_ON)  # each goes on with what those before it made
BLOCK = re.compile(r"^```(sh|python)( no-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    run: bool
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2] is None, m[3]) for m in BLOCK.finditer(text)]


def run(checkout: Path, text: str, where: object, commands: Path = Path(sys.executable).parent) -> str:
    """Run a block with bash and the `commands` of a folder, stopping at the first that fails; what it printed."""
    path = f"{commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=checkout,
        env={**os.environ, "PATH": path, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{where} exits {done.returncode}:\n{text}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a clone of the working tree would hold."""
    for folder in ("chimera", "convert", "train", "yamls", "samples", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_readme_commands_and_the_tour_run(checkout: Path, warm: Path) -> None:
    for block in blocks(ROOT / "README.md"):
        if block.run:
            assert block.text.count("composer") <= 1
            run(checkout, block.text.replace("max_duration=50ba", "max_duration=2ba"), block)
    assert (checkout / "demo/short/ep0-ba2-rank0.pt").exists()
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    (checkout / "tour.py").write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    printed = run(checkout, "MPLBACKEND=agg python tour.py", "tour.ipynb", warm)
    shown = "".join(line for cell in cells for output in cell["outputs"] for line in output.get("text", ()))
    assert "160 knowledge" in shown
    assert not [line for line in shown.splitlines() if line not in printed and "loss" not in line]


def test_pages_that_go_on_from_own_data_run_one_after_the_other(checkout: Path, warm: Path) -> None:
    printed = ""
    for page in IN_A_ROW:
        for block in blocks(ROOT / "docs" / page):
            if block.run:
                printed = run(checkout, block.text, block, warm)
                if "report.py" in block.text:
                    assert "equal those computed from the plan" in printed
    assert (checkout / "mine/hf/model.safetensors").exists()
    assert (checkout / "mine/run/ep0-ba40-rank0.pt").exists()
    assert "mine-b" not in os.listdir(checkout / "mine")
    check_formats(checkout / "mine/shards", checkout / "mine/run")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("README.md", *IN_A_ROW)], ids=str)
def test_commands_of_the_other_pages_run(page: Path, checkout: Path, warm: Path) -> None:
    for block in blocks(page):
        if block.run and block.language == "python":
            (checkout / "block.py").write_text(block.text, encoding="utf-8")
            printed = run(checkout, "python block.py", block, warm)
            for said in re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE):
                assert re.search(f"^{re.escape(said)}$", printed, re.MULTILINE), f"{block}: {said}\n{printed}"
        elif block.run:
            run(checkout, block.text, block, warm)


def test_the_page_of_public_names_shows_them_and_nothing_else() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"chimera\.(\w+)", text)) == {*chimera.__all__} - {"__version__"}


NOT_RUN = [block for page in PAGES for block in blocks(page) if not block.run]


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_commands_that_cannot_run_here_name_what_exists(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    for line in block.text.replace("\\\n", " ").splitlines():
        for number, word in enumerate(words := shlex.split(line, comments=True)):
            if re.fullmatch(r"(convert|train|bench)/\w+\.py|yamls/\S+\.yaml", word):
                assert (ROOT / word).is_file(), f"{block}: {word}"
            if re.fullmatch(r"(convert|train)/\w+\.py", word):
                check_settings(word, words[number + 1 :], f"{block}: {line}")
            if words[0] == "make" and number and not word.startswith("-"):
                assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{block}: {word}"


def check_settings(script: str, words: list[str], where: str) -> None:
    """`key=value` words must be settings of the command's config."""
    from chimera.config import load_settings
    from chimera.convert.settings import BuildSettings
    from chimera.train.settings import TrainSettings

    configs = [word for word in words if word.endswith(".yaml")]
    overrides = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
    if configs and (ROOT / configs[0]).exists():
        schema = BuildSettings if script.startswith("convert/") else TrainSettings
        load_settings(schema, ROOT / configs[0], [w for w in overrides if not w.startswith("step=")])
    else:
        assert not overrides or configs, where


@pytest.mark.parametrize("name", ["settings_page", "commands_page", "api_page", "architecture_picture"])
def test_pages_made_from_the_code_say_what_it_says(name: str) -> None:
    made = importlib.import_module(f"docs.{name}")
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), f"run `python docs/{name}.py`"


def test_the_page_of_commands_has_all_of_them() -> None:
    from docs.commands_page import COMMANDS

    named = set(re.findall(r"(chimera-\S+) = ", (ROOT / "setup.cfg").read_text(encoding="utf-8")))
    assert {wheel for _, wheel in COMMANDS.values()} == named | {"composer -m chimera.train"}
    assert all((ROOT / checkout.split()[1]).is_file() for checkout, _ in COMMANDS.values())


def keys_of(section: str) -> set[str]:
    """The keys in the tables of a section of the page of formats."""
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    lines = re.split(r"^#+ ", text, flags=re.MULTILINE)
    found = next(part for part in lines if part.startswith(f"{section}\n"))
    return {key for row in re.findall(r"^\| (`.*?) \|", found, re.MULTILINE) for key in re.findall(r"`(\S+?)`", row)}


def test_the_page_of_formats_has_every_field_of_a_manifest() -> None:
    models = {"Manifest": manifest.Manifest, "`tokenizer`": manifest.Tokenizer, "`streams.NAME`": manifest.Stream}
    models |= {"`streams.NAME.rows`": manifest.Rows, "`streams.NAME.template`": manifest.ChatTemplate}
    models |= {"`streams.NAME.train`, `streams.NAME.eval`": manifest.Split}
    for section, model in models.items():
        own = {"sha256"} if section == "Manifest" else set()  # which is of the file
        assert keys_of(section) == {*model.model_fields, *own}, section


def test_the_page_of_formats_has_every_field_of_a_status() -> None:
    assert keys_of("Status") == {field.name for field in fields(BuildStatus)}
    assert keys_of("`status.streams.NAME`") == {field.name for field in fields(StreamStatus)}
    (states,) = re.findall(
        r"^\| `state` \| text \| (`none`.*) \|$", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {*re.findall(r"`(\w+)`", states)} - {"work"} == {*STATES}


def check_formats(shards: Path, run: Path) -> None:
    """The files of a build and a run have the keys that the page of formats says."""

    def lines(path: Path) -> list[dict[str, Any]]:
        data = path.read_bytes()
        text = zstandard.ZstdDecompressor().decompressobj().decompress(data) if path.suffix == ".zst" else data
        return [json.loads(line) for line in text.splitlines()]

    for line in [line for path in shards.glob("rejects/*") for line in lines(path)]:
        assert {*line, "raw_length"} | {"line", "row"} == keys_of("Rejects")
    for path in shards.glob("proof/*"):
        assert set(lines(path)[0]) in ({"text", "ids"}, keys_of("Proof"))
    entry = json.loads(next(shards.glob("*/train/index.json")).read_text())["shards"][0]
    assert set(entry) | {"tokens", "assistant"} == keys_of("Index and shards")
    config = json.loads((run / "config.json").read_text())
    assert {*config, "parent"} == keys_of("Config")  # which a branch has
    assert set(lines(run / "starts.jsonl")[0]) == {"from_step", "ranks", "versions", "manifest"}
    assert {*lines(run / "steps.jsonl")[0], "parent"} == keys_of("Steps")
    beginnings = tuple(key.split("STREAM")[0] for key in keys_of("Metrics"))
    assert all(key == "step" or key.startswith(beginnings) for line in lines(run / "metrics.jsonl") for key in line)


def test_every_file_has_its_line_in_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    described = re.search(r"^## Map$.*?^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert described is not None
    found, folder = set(), ""
    for line in described[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        else:
            found.add(folder + name)
    folders = ("convert", "train", "chimera", "samples", "bench")
    there = {
        str(p.relative_to(ROOT)) for name in folders for p in (ROOT / name).rglob("*.py") if p.name != "__init__.py"
    }
    assert found == there


SITE = [*PAGES[1:], *(ROOT / name for name in site_pages.PROJECT_PAGES)]  # README.md is not of it: it leads there


def anchors(page: Path) -> set[str]:
    """Where a link may lead in a page: its headings, as Git hosts and the site name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {site_pages.anchor(re.sub(r"`|\]\(.*?\)|\[", "", m)) for m in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [PAGES[0], *SITE], ids=str)
def test_links_lead_to_what_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, place in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        assert not place or place in anchors(there), f"{page.name}: {target}#{place}"
        if page != PAGES[0] and there.suffix == ".md":
            assert there in SITE, f"{page.name}: {target} is no page of the site"


def test_the_site_names_every_page_once() -> None:
    named = re.findall(r'" = "(\S+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(page.name.replace("README", "index") for page in SITE)


def test_the_tests_that_security_names_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert not [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
