"""What users do wrong → what they are told: one line on stderr, exit code 2, no traceback, at every command."""

import ast
import fcntl
import importlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from chimera.cli import run

ROOT = Path(__file__).resolve().parents[1]
SHARDS, TRAIN = "yamls/demo/shards.yaml", "yamls/demo/base.yaml"
EN = "streams.en_cosmopedia"
TOKENIZER = "tokenizer.path=BUILT/tokenizer"
HELD = "shards=BUILT/shards"
STAGES = "curriculum.stages=[{from_step: 0, seq_len: %d}]"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and small finished shards of the demo's streams."""
    from convert import build_shards, train_tokenizer

    folder = tmp_path_factory.mktemp("built")
    config = [SHARDS, f"tokenizer.path={folder}/tokenizer", f"output={folder}/shards", "workers=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train_tokenizer.main([*config, "vocab_size=400"])
        build_shards.main([*config, *(f"streams.{s}.max_tokens=20000" for s in ("en_cosmopedia", "it_culturax"))])
    (folder / "nothing.yaml").write_text("output: x\ntokenizer: {path: x}\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "loop.yaml").write_text("base: loop.yaml\n")
    (folder / "null.yaml").write_text("streams: {~: {}}\n")
    (folder / "open.yaml").write_text("output: 'a${'\n")
    (folder / "reference.yaml").write_text("base: ${other}\n")
    (folder / "onto.yaml").write_text("base: nothing.yaml\ntokenizer: [x]\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "text.parquet").write_bytes(b"no parquet")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    return folder


# (command, its words, what the message must say). BUILT stands for the fixture's folder.
TABLE = [
    # Any command
    ("convert.build_shards", ["nowhere.yaml"], "no config file at nowhere.yaml"),
    ("convert.build_shards", ["BUILT/list.yaml"], "a mapping of settings is expected"),
    ("convert.build_shards", ["BUILT/loop.yaml"], "`base` leads back to itself"),
    ("train.plan", ["BUILT/broken.yaml"], "not readable as YAML"),
    ("train.plan", [TRAIN, SHARDS], "more than one config file"),
    ("convert.build_shards", ["BUILT/null.yaml"], "setting `streams`: Incompatible key type 'NoneType'"),
    ("convert.build_shards", ["BUILT/open.yaml"], "open.yaml: setting `output`: no viable alternative"),
    ("convert.build_shards", ["BUILT/reference.yaml"], "setting `base`: Interpolation key 'other' not found"),
    ("convert.build_shards", ["BUILT/onto.yaml"], "setting `tokenizer` holds a list for a mapping, or a mapping"),
    (
        "convert.build_shards",
        [SHARDS, f"{EN}.sources.0.files=a.jsonl"],
        r"files`: 'a.jsonl' stands where a list, \[a.jso",
    ),
    ("convert.build_shards", [SHARDS, f"{EN}.sources=[a.jsonl]"], "sources.0`: 'a.jsonl' stands where a mapping"),
    ("convert.build_shards", [SHARDS, "tokenizer=BUILT/tokenizer"], "`tokenizer`: '.*' stands where a mapping, {key: "),
    ("train.main", [], "no config file given"),
    ("train.main", [TRAIN, "sead=1"], "Key 'sead' not in 'TrainSettings'"),
    ("train.main", [TRAIN, "phases.1.stepps=1"], "setting `phases.1.stepps`: Key 'stepps' not in"),
    ("train.main", [TRAIN, "phases.1.steps=x"], "setting `phases.1.steps`: Value 'x'"),
    ("train.main", [TRAIN, "phases.1.proportions=[a]"], "setting `phases.1`: Invalid type assigned: list"),
    ("train.main", [TRAIN, "phases=[{name: a}]"], "setting `phases.0.steps`: .* missing mandatory value"),
    ("train.main", [TRAIN, "phases.0=null"], "setting `phases.0`"),
    ("convert.build_shards", [SHARDS, f"{EN}.sources.0.colum=a"], "sources.0.colum`: Key 'colum' not in"),
    ("train.main", [TRAIN, "num_workers=-1"], "setting `num_workers` is -1; it is from 0 to 1024"),
    ("train.main", [TRAIN, "optimizer.betas=[0.9]"], r"`optimizer.betas` is \[0.9\]; two numbers"),
    ("train.main", [TRAIN, "optimizer.lr=.nan"], "`optimizer.lr` is nan; it is at least 0"),
    ("train.main", [TRAIN, "optimizer.lr=.inf"], "`optimizer.lr` is inf; it is at least 0 and finite"),
    ("train.main", [TRAIN, "save_folder=./x{rank}"], "`save_folder` is './x{rank}'; no braces are possible"),
    ("train.main", [TRAIN, "save_folder='~/run'"], "setting `save_folder`: '~/run' must be a path as it is, without ~"),
    ("train.main", [TRAIN, 'cache="a\\0b"'], "setting `cache`: .* must be a path as it is, without ~ or a NUL"),
    ("train.main", [TRAIN, "optimizer.clip_norm=0"], "`optimizer.clip_norm` is 0.0; it is above 0"),
    ("train.main", [TRAIN, "model.attention_dropout=2"], "`model.attention_dropout` is 2; it is from 0 to 1"),
    ("train.main", [TRAIN, "scheduler.final=2"], "`scheduler.final` is 2.0; it is from 0 to 1"),
    ("train.main", [TRAIN, "run_name=''"], "setting `run_name` is empty"),
    ("train.main", [TRAIN, "eval.seq_lens={}"], "`eval` holds a list for a mapping, or a mapping for a list"),
    ("train.main", [TRAIN, HELD, "phases.0.name=''"], "phases are named '', .*each needs a name of its own"),
    ("train.main", [TRAIN, HELD, "phases.0.steps=99999999999999999"], r"more than 1e\+12 steps in all"),
    ("train.main", [TRAIN, HELD, "phases.0.global_train_batch_size=0"], "300 steps of 0 sequences"),
    ("train.main", [TRAIN, HELD, "num_canonical_nodes=9999999999"], "in each of 9999999999 lanes"),
    ("train.main", [TRAIN, HELD, "save_folder=/dev/null"], "save_folder /dev/null cannot be written to"),
    ("train.main", [TRAIN, HELD, "save_folder=ftp://box/run"], "save_folder ftp://box/run cannot be used: NotImpl"),
    ("train.main", [TRAIN, HELD, "save_folder=oci://box/run"], "save_folder oci://box/run cannot be used: "),
    ("train.main", [TRAIN, HELD, "save_folder=dbfs:/Volumes/a/b/c/run"], "Composer's client replaces no file there"),
    ("train.main", [TRAIN, HELD, "model.hidden_size=0", "save_folder=BUILT/run"], "`model`: ZeroDivisionError"),
    ("train.main", [TRAIN, HELD, "model.num_attention_heads=3", "save_folder=BUILT/run"], "sizes do not fit together"),
    ("train.main", [TRAIN, HELD, "model.pretrained=7", "save_folder=BUILT/run"], "`model.pretrained` is 7; it is the"),
    ("train.main", [TRAIN, HELD, "model.vocab_size=abc", "save_folder=BUILT/run"], "`model.vocab_size` is 'abc'"),
    ("train.main", [TRAIN, "generate={interval: 5, prompts: ['']}"], "`generate.prompts` holds an empty one"),
    ("train.main", [TRAIN, HELD, "eval={interval: 5, seq_lens: [300]}"], "300 tokens do not divide blocks of"),
    ("train.main", [TRAIN, HELD, "parallelism={fspd: {}}"], "`parallelism` has fspd; it takes `fsdp"),
    ("train.main", [TRAIN, HELD, "parallelism={fsdp: 5}"], "`parallelism` has fsdp; it takes `fsdp: {...}` alone"),
    ("train.main", [TRAIN, HELD, "parallelism={fsdp: {sharding: x}}"], "`parallelism.fsdp.sharding` is unknown"),
    ("train.main", [TRAIN, HELD, "parallelism={fsdp: {state_dict_type: sharded}}"], "it must be full"),
    ("train.main", [TRAIN, "seed=ten"], "setting `seed`: Value 'ten'"),
    ("train.main", [TRAIN, "phases.7.steps=1"], "override `phases.7.steps=1`"),
    # Building: settings
    ("convert.build_shards", [SHARDS, "output=''"], "setting `output` is missing"),
    ("convert.build_shards", [SHARDS, "output=2024_10"], "setting `output`: YAML reads 202410 where a text is wanted"),
    (
        "convert.build_shards",
        [SHARDS, f"{EN}.sources=[{{hub: a/b, subset: no}}]"],
        "sources.0.subset`: YAML reads False",
    ),
    (
        "convert.build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [a.jsonl, 1.5]}}]"],
        "sources.0.files.1`: YAML reads 1.5",
    ),
    ("train.main", [TRAIN, "phases.0.name=on"], "setting `phases.0.name`: YAML reads True"),
    ("convert.build_shards", [SHARDS, "output=s3:/bucket/x"], "s3:/bucket/x is not an address to write to"),
    ("convert.build_shards", [SHARDS, "output=s3://bucket/a//b"], "s3://bucket/a//b is not an address to write to"),
    ("convert.build_shards", [SHARDS, "output=s3://bucket/a/../b"], "a/../b is not an address to write to"),
    ("convert.build_shards", [SHARDS, "output=hf://datasets/me"], "hf://datasets/me is not an address to write to"),
    ("convert.build_shards", [SHARDS, "output=dbfs:/Volumes/a/b"], "dbfs:/Volumes/a/b is not an address to write to"),
    ("convert.build_shards", ["BUILT/nothing.yaml"], "`streams` is empty"),
    ("convert.build_shards", [SHARDS, "block_len=100"], "block_len: 100 must be a multiple of 8"),
    ("convert.build_shards", [SHARDS, "shard_bytes=4000000000"], "must be below 2147483648"),
    ("convert.build_shards", [SHARDS, "stall_after=0"], "stall_after: 0.0 must be above 0 seconds"),
    ("convert.build_shards", [SHARDS, "eval_fraction=1.5"], "eval_fraction: 1.5 must be at least 0 and below 1"),
    ("convert.build_shards", [SHARDS, "engine=slurm"], "engine: `slurm` must be one of local, ray"),
    ("convert.build_shards", [SHARDS, "hash=crc"], "hash: `crc` must be one of"),
    ("convert.build_shards", [SHARDS, "compression=gz"], "compression: `gz` must be null, zstd"),
    ("convert.build_shards", [SHARDS, "workers=0"], "workers: 0 must be a whole number above 0"),
    ("convert.build_shards", [SHARDS, f"{EN}.format=html"], f"{EN}.format: `html` must be one of text, chatml"),
    ("convert.build_shards", [SHARDS, f"{EN}.packing=tight"], f"{EN}.packing: `tight` must be one of"),
    ("convert.build_shards", [SHARDS, f"{EN}.sources=[]"], f"{EN}.sources is empty"),
    ("convert.build_shards", [SHARDS, f"{EN}.sources=[{{}}]"], "give either `hub` or `files`"),
    (
        "convert.build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [[a]]}}]"],
        r"sources.0.files: \[\['a'\]\] must be paths",
    ),
    (
        "convert.build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [a.jsonl], subset: it}}]"],
        "`subset`, `data_dir`, `split` and `revision` are for `hub`; files have none",
    ),
    ("convert.build_shards", [SHARDS, "part_bytes=8"], "part_bytes: 8 must be at least 1024"),
    ("convert.build_shards", [SHARDS, f"{EN}.min_chars=-1"], "must not be negative"),
    ("convert.build_shards", [SHARDS, "streams={a/b: {sources: [{files: [x.jsonl]}]}}"], "letters, digits"),
    # Building: tokenizer
    ("convert.build_shards", [SHARDS, "tokenizer.path=BUILT/empty"], "tokenizer.path: .* cannot be read"),
    ("convert.build_shards", [SHARDS, "tokenizer.path=BUILT/list.yaml"], "not readable as a tokenizer"),
    ("convert.build_shards", [SHARDS, TOKENIZER, "tokenizer.eos_token=</s>"], "'</s>' is not among its added tokens"),
    ("convert.build_shards", [SHARDS, TOKENIZER, "tokenizer.pad_token=<|endoftext|>"], "they must differ"),
    ("convert.train_tokenizer", [SHARDS, "tokenizer.path=/dev/null/x"], "/dev/null/x: Not a directory: give another"),
    ("convert.train_tokenizer", [SHARDS, TOKENIZER], "exists: add overwrite=true"),
    (
        "convert.train_tokenizer",
        [SHARDS, "tokenizer.path=BUILT/new", "vocab_size=10"],
        "vocab_size: 10 must be at least",
    ),
    # Building: sources and output
    (
        "convert.build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.sources=[{{files: [BUILT/none.jsonl]}}]"],
        f"{EN}: no source opens: .*no file at",
    ),
    (
        "convert.build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.sources=[{{files: [BUILT/text.parquet]}}]"],
        "text.parquet is no parquet file",
    ),
    (
        "convert.build_shards",
        [
            SHARDS,
            TOKENIZER,
            "output=BUILT/new",
            f"{EN}.sources=[{{files: [samples/en_lessons.parquet], column: body}}]",
        ],
        "has no column `body`: set `column` to one of",
    ),
    (
        "convert.build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.format=chatml"],
        "has neither `messages` nor `instruction`",
    ),
    ("convert.build_shards", [SHARDS, TOKENIZER, "output=BUILT/shards"], "was made otherwise .*max_tokens"),
    ("convert.build_shards", [SHARDS, f"streams={{{'a' * 129}: {{sources: [{{files: [x.jsonl]}}]}}}}"], "at most 128"),
    ("convert.verify_shards", ["BUILT/empty"], "no readable manifest.json"),
    ("convert.verify_shards", ["s3://"], "ROOT: s3:// is not an address to write to"),
    # Plan and schedule
    ("train.plan", [TRAIN, "phases=[]"], "setting `phases` is empty"),
    ("train.plan", [TRAIN, "curriculum.stages=[]"], "setting `curriculum.stages` is empty"),
    ("train.plan", [TRAIN, "curriculum.mode=epochs"], "setting `curriculum.mode` is 'epochs'; one of"),
    ("train.plan", [TRAIN, "train_on=user"], "setting `train_on` is 'user'; one of all, assistant"),
    ("train.plan", [TRAIN, "device_train_microbatch_tokens=some"], "tokens as a whole number, or auto"),
    ("train.plan", [TRAIN, HELD, "phases.0.proportions.it_culturax=0.3"], "the proportions sum to 0.95"),
    (
        "train.plan",
        [TRAIN, HELD, "phases.0.proportions.it_culturax=much"],
        "`phases.0.proportions.it_culturax`: 'much' is not a",
    ),
    ("train.plan", [TRAIN, HELD, "phases.0.proportions.it_culturax=-1"], "is negative"),
    ("train.plan", [TRAIN, HELD, "phases.0.steps=0"], "both must be at least 1"),
    ("train.plan", [TRAIN, HELD, STAGES % 48], "sequences of 48 tokens do not divide blocks of 128; .*32 and 64"),
    ("train.plan", [TRAIN, HELD, "curriculum.stages.0.from_step=5"], "the first must be 0"),
    ("train.plan", [TRAIN, HELD, "global_train_batch_size=10"], "do not fill whole blocks of 128; .*8 or 12"),
    ("train.plan", [TRAIN, HELD, "num_canonical_nodes=0"], "0 lanes: at least 1 is needed"),
    ("train.inspect_batch", [TRAIN, HELD], "which step\\? Give step=N"),
    ("train.inspect_batch", [TRAIN, HELD, "step=400"], "step 400 is outside of the plan's steps 0 to 399"),
    ("train.inspect_batch", [TRAIN, "shards=BUILT/empty", "step=1"], "no shards at"),
    # Shards
    ("train.main", [TRAIN, "shards=BUILT/empty"], "no shards at .*build_shards.py"),
    (
        "train.main",
        [TRAIN, HELD, "phases=[{name: a, steps: 1, proportions: {it_culturx: 1}}]"],
        "stream `?it_culturx`? .*it_culturax",
    ),
    ("train.main", [TRAIN, HELD, "tokenizer=BUILT/empty"], "setting `tokenizer`: no tokenizer.json"),
    # Reports and exports
    ("train.report", ["BUILT/empty"], "no run in .*no config.json there"),
    ("train.report", ["s3://bucket/run"], "is not a local folder"),
    ("train.export_hf", ["BUILT/none.pt", "BUILT/full"], "is not empty: give a new folder"),
]


@pytest.mark.parametrize(("command", "words", "message"), TABLE, ids=[f"{c} {' '.join(w)}" for c, w, _ in TABLE])
def test_a_mistake_is_one_line_and_exit_code_2(
    command: str,
    words: list[str],
    message: str,
    built: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    words = [word.replace("BUILT", str(built)) for word in words]
    if command == "convert.build_shards" and not any(word.startswith("output=") for word in words):
        words.append(f"output={built}/unused")
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(command).main, words)
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in errors[0]
    assert not (built / "unused" / "manifest.json").exists()


def test_the_launcher_shows_the_line_once_and_no_traceback(tmp_path: Path) -> None:
    composer = Path(sys.executable).parent / "composer"
    done = subprocess.run(
        [composer, "-n", "2", "train/main.py", TRAIN, f"shards={tmp_path}/none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("error: no shards at") == 1


def test_every_message_is_in_the_troubleshooting_page() -> None:
    """Of each error raised anywhere, a fixed part of its text must stand there."""
    page = squeezed((ROOT / "docs/troubleshooting.md").read_text() + (ROOT / "docs/resume.md").read_text())
    missing = []
    for path in sorted([*ROOT.glob("chimera/*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("train/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and node.func.id in ERRORS:
                parts = [squeezed(p) for p in fixed_parts(node.args[0])]
                parts = [part for part in parts if len(part) >= 12]
                if parts and not any(part in page for part in parts):
                    missing.append(f"{path.name}:{node.lineno}: {' … '.join(parts)}")
    assert not missing, "\n".join(missing)


ERRORS = {"UserError", "ScheduleError", "StateMismatch", "ShardError", "CannotOpen"}


def fixed_parts(message: ast.expr) -> list[str]:
    """The literal parts of a string or f-string, cut where a value stands and at `: `, `; ` and brackets."""
    if isinstance(message, ast.Constant):
        return re.split(r"[:;] | \(|^/\S+ ", str(message.value))
    if isinstance(message, ast.JoinedStr):
        return [part for value in message.values for part in fixed_parts(value)]
    return []


def squeezed(text: str) -> str:
    """`text` without what Markdown and line breaks add."""
    return re.sub(r"\s+", " ", re.sub(r"[`\\]", "", text)).strip()


def build_words(built: Path, output: Path) -> list[str]:
    return [SHARDS, f"tokenizer.path={built}/tokenizer", f"output={output}", "workers=1"]


def test_without_a_terminal_progress_is_plain_lines(built: Path, tmp_path: Path) -> None:
    words = build_words(built, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "convert/build_shards.py", *words], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 0
    said = done.stderr.decode()  # plain UTF-8
    assert "\x1b" not in said
    assert "\r" not in said
    assert re.search(r"^en_cosmopedia: 100%\|#+\| \S+/\S+ \[\S+<\S+, .*/s\b.*\]$", said, re.MULTILINE), said


@pytest.mark.parametrize("no_color", [True, False])
def test_on_a_terminal_progress_is_one_bar_and_no_color_is_respected(
    built: Path, tmp_path: Path, no_color: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | ({"NO_COLOR": "1"} if no_color else {})
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        [sys.executable, "convert/build_shards.py", *build_words(built, tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
    ) as process:
        os.close(secondary)
        said = b""
        while chunk := read_terminal(primary):
            said += chunk
        assert process.wait() == 0
    os.close(primary)
    assert b"\r" in said
    assert "100%|█".encode() in said
    if no_color:
        assert re.search(rb"\x1b\[[0-9;]*m", said) is None, "colours although NO_COLOR is set"


def read_terminal(primary: int) -> bytes:
    """What a pseudo-terminal gives next; nothing once its other end is closed."""
    try:
        return os.read(primary, 65536)
    except OSError:
        return b""
