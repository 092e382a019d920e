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
MISFIT = "sizes do not fit together|not a multiple of the number of attention heads"  # transformers 4 | 5
STAGES = "curriculum.stages=[{from_step: 0, seq_len: %d}]"


def away(folder: Path) -> Path:
    """`folder` as a place to run from: the demo's configs and samples are there, and no run of `make demo`."""
    for name in ("yamls", "samples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and small finished shards of the demo's streams."""
    from chimera.commands import build_shards, train_tokenizer

    folder = tmp_path_factory.mktemp("built")
    config = [SHARDS, f"tokenizer.path={folder}/tokenizer", f"output={folder}/shards", "workers=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(away(folder))
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
    ("build_shards", ["nowhere.yaml"], "no config file at nowhere.yaml"),
    ("build_shards", ["BUILT/list.yaml"], "a mapping of settings is expected"),
    ("build_shards", ["BUILT/loop.yaml"], "`base` leads back to itself"),
    ("plan", ["BUILT/broken.yaml"], "not readable as YAML"),
    ("plan", [TRAIN, SHARDS], "more than one config file"),
    ("build_shards", ["BUILT/null.yaml"], "setting `streams`: Incompatible key type 'NoneType'"),
    (
        "build_shards",
        ["BUILT/open.yaml"],
        "open.yaml: setting `output`: no viable alternative",
    ),
    ("build_shards", ["BUILT/reference.yaml"], "`base` is '.{other}'; it must be the path of a YAML file"),
    ("build_shards", ["BUILT/onto.yaml"], r"setting `tokenizer` is \['x'\]; it must be a mapping"),
    (
        "build_shards",
        [SHARDS, f"{EN}.sources.0.files=a.jsonl"],
        r"files` is 'a.jsonl'; it must be a list, \[a.jsonl\]$",
    ),
    ("build_shards", [SHARDS, f"{EN}.sources=[a.jsonl]"], "sources.0` is 'a.jsonl'; it must be a mapping"),
    ("build_shards", [SHARDS, "tokenizer=BUILT/tokenizer"], "`tokenizer` is '.*'; it must be a mapping, {key: value}"),
    ("train", [], "no config file given"),
    ("train", [TRAIN, "sead=1"], "setting `sead` is unknown: is `seed` meant"),
    ("train", [TRAIN, "phases.1.stepps=1"], "setting `phases.1.stepps` is unknown: is `steps` meant"),
    ("train", [TRAIN, "phases.1.steps=x"], "setting `phases.1.steps` is 'x'; it must be a whole number"),
    ("train", [TRAIN, "phases.1.proportions=[a]"], r"setting `phases.1.proportions` is \['a'\]; it must be a mapping"),
    ("train", [TRAIN, "phases=[{name: a}]"], "setting `phases.0.steps` is missing"),
    ("train", [TRAIN, "phases.0=null"], "setting `phases.0` is None; it must be a mapping"),
    ("build_shards", [SHARDS, f"{EN}.sources.0.colum=a"], "sources.0.colum` is unknown: is `column` meant"),
    ("train", [TRAIN, "num_workers=-1"], "setting `num_workers` is -1; it must be at least 0"),
    ("train", [TRAIN, "optimizer.betas=[0.9]"], r"`optimizer.betas` is \[0.9\]; it must be two numbers"),
    ("train", [TRAIN, "optimizer.name=lion"], "setting `optimizer.name` is 'lion'; it must be adamw or muon"),
    ("train", [TRAIN, "optimizer.weight_decay_on=x"], "`optimizer.weight_decay_on` is 'x'; it must be matrices or all"),
    ("train", [TRAIN, "scheduler.decay=step"], "`scheduler.decay` is 'step'; it must be linear, cosine or sqrt"),
    (
        "train",
        [TRAIN, HELD, "optimizer.name=muon", "parallelism={fsdp: {}}", "save_folder=BUILT/run"],
        "`optimizer.name: muon` needs whole matrices on each rank, and `parallelism` cuts them",
    ),
    ("train", [TRAIN, "optimizer.lr=.nan"], "`optimizer.lr` is nan; it must be finite"),
    ("train", [TRAIN, "optimizer.lr=.inf"], "`optimizer.lr` is inf; it must be finite"),
    ("train", [TRAIN, "save_folder=./x{rank}"], "`save_folder` is './x{rank}'; no braces are possible"),
    (
        "train",
        [TRAIN, "save_folder='~/run'"],
        "`save_folder` is '~/run'; it must be a path as it is, without ~",
    ),
    ("train", [TRAIN, 'cache="a\\0b"'], "setting `cache` is .* must be a path as it is, without ~ or a NUL"),
    ("train", [TRAIN, "optimizer.clip_norm=0"], "`optimizer.clip_norm` is 0; it must be above 0$"),
    ("train", [TRAIN, "model.attention_dropout=2"], "`model.attention_dropout` is 2; it must be from 0 to 1"),
    ("train", [TRAIN, "scheduler.final=2"], "`scheduler.final` is 2; it must be at most 1$"),
    ("train", [TRAIN, "run_name=''"], "setting `run_name` is missing or empty"),
    ("train", [TRAIN, "eval.seq_lens={}"], r"`eval.seq_lens` is {}; it must be a list"),
    ("train", [TRAIN, HELD, "phases.0.name=''"], "phases are named '', .*each needs a name of its own"),
    ("train", [TRAIN, HELD, "phases.0.steps=99999999999999999"], r"more than 1e\+12 steps in all"),
    (
        "train",
        [TRAIN, HELD, "phases.0.global_train_batch_size=0"],
        "0.global_train_batch_size` is 0; it must be at least 1",
    ),
    ("train", [TRAIN, HELD, "num_canonical_nodes=9999999999"], "in each of 9999999999 lanes"),
    ("train", [TRAIN, HELD, "save_folder=/dev/null"], "save_folder /dev/null cannot be written to"),
    ("train", [TRAIN, HELD, "save_folder=ftp://box/run"], "save_folder ftp://box/run cannot be used: Composer"),
    (
        "train",
        [TRAIN, HELD, "save_folder=oci://box/run"],
        "save_folder oci://box/run cannot be listed: .*needs ~/.oci/config",
    ),
    (
        "train",
        [TRAIN, HELD, "save_folder=dbfs:/Volumes/a/b/c/run"],
        "save_folder dbfs:.* cannot be used: Composer",
    ),
    (
        "train",
        [TRAIN, HELD, "model.hidden_size=0", "save_folder=BUILT/run"],
        "`model.hidden_size` is 0; it must be at least 1",
    ),
    ("train", [TRAIN, HELD, "model.num_attention_heads=3", "save_folder=BUILT/run"], MISFIT),
    ("train", [TRAIN, HELD, "model.pretrained=7", "save_folder=BUILT/run"], "`model.pretrained` is 7; it is the"),
    (
        "train",
        [TRAIN, HELD, "model.pretrained=owner/name", "save_folder=BUILT/run"],
        "no folder owner/name: a model of the hub is fetched with `hf download NAME",
    ),
    ("train", [TRAIN, HELD, "model.vocab_size=abc", "save_folder=BUILT/run"], "`model.vocab_size` is 'abc'"),
    ("train", [TRAIN, "generate={interval: 5, prompts: ['']}"], "setting `generate.prompts.0` is missing or empty"),
    ("train", [TRAIN, HELD, "eval={interval: 5, seq_lens: [300]}"], "300 tokens do not divide blocks of"),
    ("train", [TRAIN, HELD, "parallelism={fspd: {}}"], "`parallelism` has fspd; it takes `fsdp"),
    ("train", [TRAIN, HELD, "parallelism={fsdp: 5}"], "`parallelism` has fsdp; it takes `fsdp: {...}` alone"),
    ("train", [TRAIN, HELD, "parallelism={fsdp: {sharding: x}}"], "`parallelism.fsdp.sharding` is unknown"),
    ("train", [TRAIN, HELD, "parallelism={fsdp: {state_dict_type: sharded}}"], "it must be full"),
    ("train", [TRAIN, "seed=ten"], "setting `seed` is 'ten'; it must be a whole number"),
    ("train", [TRAIN, "run_name=${oc.env:HOME}"], "setting `run_name` is '.{oc.env:HOME}': .*nothing else"),
    ("train", [TRAIN, "run_name=${seed}", "cache=x${oc.${run_name}:HOME}"], "setting `cache` is .*nothing else"),
    ("train", [TRAIN, "eval.blocks=${sead}"], "setting `eval.blocks`: Interpolation key 'sead' not found"),
    ("train", [TRAIN, "seed=on"], "setting `seed` is True; it must be a whole number"),
    ("train", [TRAIN, "autoresume=2"], "setting `autoresume` is 2; it must be true or false"),
    ("train", [TRAIN, "max_passes=four"], "setting `max_passes` is 'four'; it must be a number"),
    ("train", [TRAIN, "cache_limit=much"], "setting `cache_limit` is 'much': write bytes, or e.g. 200gb"),
    (
        "train",
        [TRAIN, "phases.0.proportions.it_culturax=on"],
        "culturax` is True; it must be a whole number or a",
    ),
    ("train", [TRAIN, "phases.7.steps=1"], "override `phases.7.steps=1`"),
    # Building: settings
    ("build_shards", [SHARDS, "output=''"], "setting `output` is missing or empty; to be given: a folder, s3://"),
    ("build_shards", [SHARDS, "output=2024_10"], "setting `output`: YAML reads 202410 where a text is wanted"),
    (
        "build_shards",
        [SHARDS, f"{EN}.sources=[{{hub: a/b, subset: no}}]"],
        "sources.0.subset`: YAML reads False",
    ),
    (
        "build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [a.jsonl, 1.5]}}]"],
        "sources.0.files.1`: YAML reads 1.5",
    ),
    ("train", [TRAIN, "phases.0.name=on"], "setting `phases.0.name`: YAML reads True"),
    ("build_shards", [SHARDS, "output=s3:/bucket/x"], "s3:/bucket/x is not an address to write to"),
    ("build_shards", [SHARDS, "output=s3://bucket/a//b"], "s3://bucket/a//b is not an address to write to"),
    ("build_shards", [SHARDS, "output=s3://bucket/a/../b"], "a/../b is not an address to write to"),
    ("build_shards", [SHARDS, "output=hf://datasets/me"], "hf://datasets/me is not an address to write to"),
    ("build_shards", [SHARDS, "output=dbfs:/Volumes/a/b"], "dbfs:/Volumes/a/b is not an address to write to"),
    (
        "build_shards",
        [SHARDS, "output=alipan:///a"],
        "alipan:///a is not an address to write to: take a folder",
    ),
    ("build_shards", ["BUILT/nothing.yaml"], "`streams` is missing or empty"),
    ("build_shards", [SHARDS, "block_len=100"], "`block_len` is 100; it must be a multiple of 8"),
    ("build_shards", [SHARDS, "shard_bytes=4000000000"], "`shard_bytes` is 4000000000; it must be below 2147483648"),
    ("build_shards", [SHARDS, "stall_after=0"], "`stall_after` is 0; it must be above 0"),
    ("build_shards", [SHARDS, "eval_fraction=1.5"], "`eval_fraction` is 1.5; it must be below 1"),
    ("build_shards", [SHARDS, "engine=slurm"], "`engine` is 'slurm'; it must be local, ray or array"),
    ("build_shards", [SHARDS, "hash=crc"], "`hash` is 'crc'; it must be one of"),
    ("build_shards", [SHARDS, "compression=gz"], "`compression` is 'gz'; it must be null, zstd"),
    (
        "build_shards",
        [SHARDS, "compression=[1]"],
        r"`compression` is \[1\]; it must be null, zstd or zstd:1 to zstd:22$",
    ),
    (
        "build_shards",
        [SHARDS, "tokenizer.pad_token={ad: x}"],
        r"`tokenizer.pad_token` is {'ad': 'x'}; it must be a token, {add: TOKEN} or null$",
    ),
    ("build_shards", [SHARDS, "workers=0"], "`workers` is 0; it must be at least 1 or auto"),
    ("build_shards", [SHARDS, "workers=[1]"], r"`workers` is \[1\]; it must be a whole number or auto"),
    ("build_shards", [SHARDS, "streams.en_cosmopedia.sources.0.column=[1, 2]"], r"0\.column` is \[1, 2\]; it must be"),
    ("build_shards", [SHARDS, f"{EN}.format=html"], f"`{EN}.format` is 'html'; it must be text, chat or chatml"),
    (
        "build_shards",
        [SHARDS, f"{EN}.format=chat", f"{EN}.template=llama3"],
        f"`{EN}.template` is 'llama3'; it must be chatml, tokenizer .* or the path of a .jinja file",
    ),
    (
        "build_shards",
        [SHARDS, f"{EN}.packing=tight"],
        f"`{EN}.packing` is 'tight'; it must be concat, best_fit",
    ),
    ("build_shards", [SHARDS, f"{EN}.sources=[]"], f"`{EN}.sources` is missing or empty"),
    ("build_shards", [SHARDS, f"{EN}.sources=[{{}}]"], "give either `hub` or `files`"),
    (
        "build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [[a]]}}]"],
        r"sources.0.files.0` is \['a'\]; it must be a text",
    ),
    (
        "build_shards",
        [SHARDS, f"{EN}.sources=[{{files: [a.jsonl], subset: it}}]"],
        "`subset`, `data_dir`, `split` and `revision` are for `hub`; files have none",
    ),
    ("build_shards", [SHARDS, "part_bytes=8"], "`part_bytes` is 8; it must be at least 1024"),
    ("build_shards", [SHARDS, f"{EN}.min_chars=-1"], "min_chars` is -1; it must be at least 0"),
    ("build_shards", [SHARDS, "streams={a/b: {sources: [{files: [x.jsonl]}]}}"], "letters, digits"),
    # Building: tokenizer
    (
        "build_shards",
        [SHARDS, "tokenizer.path=BUILT/empty"],
        "tokenizer.path: .* cannot be read .*: give a folder .*hf download NAME",
    ),
    ("build_shards", [SHARDS, "tokenizer.path=BUILT/list.yaml"], "not readable as a tokenizer"),
    ("build_shards", [SHARDS, TOKENIZER, "tokenizer.eos_token=</s>"], "'</s>' is not among its added tokens"),
    ("build_shards", [SHARDS, TOKENIZER, "tokenizer.pad_token=<|endoftext|>"], "they must differ"),
    ("train_tokenizer", [SHARDS, "tokenizer.path=/dev/null/x"], "/dev/null/x: Not a directory: give another"),
    ("train_tokenizer", [SHARDS, TOKENIZER], "exists: add overwrite=true"),
    (
        "train_tokenizer",
        [SHARDS, "tokenizer.path=BUILT/new", "vocab_size=10"],
        "vocab_size: 10 must be at least",
    ),
    # Building: sources and output
    (
        "build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.sources=[{{files: [BUILT/none.jsonl]}}]"],
        f"{EN}: no source opens: .*no file at",
    ),
    (
        "build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.sources=[{{files: [BUILT/text.parquet]}}]"],
        "text.parquet is no parquet file",
    ),
    (
        "build_shards",
        [
            SHARDS,
            TOKENIZER,
            "output=BUILT/new",
            f"{EN}.sources=[{{files: [samples/en_lessons.parquet], column: body}}]",
        ],
        "has no column `body`: set `column` to one of",
    ),
    (
        "build_shards",
        [SHARDS, TOKENIZER, "output=BUILT/new", f"{EN}.format=chatml"],
        "has no conversation: it has text, and neither `messages` nor",
    ),
    ("build_shards", [SHARDS, TOKENIZER, "worker_memory=much"], "`worker_memory` is 'much': write bytes"),
    (
        "build_shards",
        [SHARDS, TOKENIZER, "worker_memory=100mb"],
        "`worker_memory` is '100mb'; it must be at least 512",
    ),
    ("build_shards", [SHARDS, TOKENIZER, "output=BUILT/shards"], "was built with other settings .*max_tokens"),
    ("build_shards", [SHARDS, f"streams={{{'a' * 129}: {{sources: [{{files: [x.jsonl]}}]}}}}"], "at most 128"),
    ("verify_shards", ["BUILT/empty"], "no readable manifest.json"),
    ("verify_shards", ["s3://"], "ROOT: s3:// is not an address to write to"),
    # Plan and schedule
    ("plan", [TRAIN, "phases=[]"], "setting `phases` is missing or empty"),
    ("plan", [TRAIN, "curriculum.stages=[]"], "setting `curriculum.stages` is missing or empty"),
    (
        "plan",
        [TRAIN, "curriculum.mode=epochs"],
        "`curriculum.mode` is 'epochs'; it must be sequences or tokens",
    ),
    ("plan", [TRAIN, "train_on=user"], "setting `train_on` is 'user'; it must be all or assistant"),
    ("plan", [TRAIN, "device_train_microbatch_tokens=some"], "is 'some'; it must be a whole number or auto"),
    ("plan", [TRAIN, HELD, "phases.0.proportions.it_culturax=0.3"], "the proportions sum to 0.95"),
    (
        "plan",
        [TRAIN, HELD, "phases.0.proportions.it_culturax=much"],
        "`phases.0.proportions.it_culturax`: 'much' is not a",
    ),
    ("plan", [TRAIN, HELD, "phases.0.proportions.it_culturax=-1"], "is negative"),
    ("plan", [TRAIN, HELD, "phases.0.steps=0"], "`phases.0.steps` is 0; it must be at least 1"),
    ("plan", [TRAIN, HELD, STAGES % 48], "sequences of 48 tokens do not divide blocks of 128; .*32 and 64"),
    ("plan", [TRAIN, HELD, "curriculum.stages.0.from_step=5"], "the first must be 0"),
    ("plan", [TRAIN, HELD, "global_train_batch_size=10"], "do not fill whole blocks of 128; .*8 or 12"),
    ("plan", [TRAIN, HELD, "num_canonical_nodes=0"], "`num_canonical_nodes` is 0; it must be at least 1"),
    ("inspect_batch", [TRAIN, HELD], "which step\\? Give step=N"),
    ("inspect_batch", [TRAIN, HELD, "step=400"], "step 400 is outside of the plan's steps 0 to 399"),
    ("inspect_batch", [TRAIN, "shards=BUILT/empty", "step=1"], "no shards at"),
    # Shards
    ("train", [TRAIN, "shards=BUILT/empty"], "no shards at .*build_shards.py"),
    (
        "train",
        [TRAIN, HELD, "phases=[{name: a, steps: 1, proportions: {it_culturx: 1}}]"],
        "stream `?it_culturx`? .*it_culturax",
    ),
    ("train", [TRAIN, HELD, "tokenizer=BUILT/empty"], "setting `tokenizer`: no tokenizer.json"),
    # Reports and exports
    ("report", ["BUILT/empty"], "no run in .*no config.json there"),
    ("report", ["ftp://box/run"], "save_folder ftp://box/run cannot be used: Composer"),
    ("export_hf", ["BUILT/none.pt", "BUILT/full"], "is not empty: give a new folder"),
    ("evaluate", ["BUILT/none.pt"], "no checkpoint at .*none.pt"),
    ("evaluate", ["BUILT/text.parquet"], "no config.json beside .*: give the CONFIG of its run"),
    ("evaluate", ["BUILT/text.parquet", TRAIN, HELD, "eval.seq_lens=[48]"], "sequences of 48 tokens do not divide"),
    ("evaluate", ["BUILT/text.parquet", TRAIN, HELD], "text.parquet is not a checkpoint that can be read"),
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
    monkeypatch.chdir(built)
    words = [word.replace("BUILT", str(built)) for word in words]
    if command == "build_shards" and not any(word.startswith("output=") for word in words):
        words.append(f"output={built}/unused")
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(f"chimera.commands.{command}").main, words)
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in errors[0]
    assert not (built / "unused" / "manifest.json").exists()


def test_the_launcher_shows_the_line_once_and_no_traceback(tmp_path: Path, warm: Path) -> None:
    done = subprocess.run(
        [warm / "composer", "-n", "2", ROOT / "train/main.py", TRAIN, f"shards={tmp_path}/none"],
        cwd=away(tmp_path),
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
    for path in sorted((ROOT / "chimera").rglob("*.py")):
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
        [sys.executable, ROOT / "convert/build_shards.py", *words], cwd=built, capture_output=True, timeout=120
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
        [sys.executable, ROOT / "convert/build_shards.py", *build_words(built, tmp_path / "out")],
        cwd=built,
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
        assert re.search(rb"\x1b\[[0-9;]*m", said) is None, "colors although NO_COLOR is set"


def read_terminal(primary: int) -> bytes:
    """What a pseudo-terminal gives next; nothing once its other end is closed."""
    try:
        return os.read(primary, 65536)
    except OSError:
        return b""
