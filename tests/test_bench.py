"""Each script of bench/ at its smallest size: that it runs, and the rows that come out; never a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.convert.small_tokenizer import spec

ROOT = Path(__file__).resolve().parents[1]


def bench(script: str, *arguments: str, code: int = 0, python: str | Path = sys.executable) -> str:
    """What a script prints on stdout."""
    command = [python, f"bench/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stderr)  # shown where a test fails
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.chaos  # for its time alone
def test_gpu_kills_and_resumes_and_names_what_it_skips(out: Path, warm: Path) -> None:
    names = ["matmul ceiling", "kill and resume", "fsdp on one rank"]
    printed = bench("gpu.py", "--smallest", "--only", *names, "--json", str(out), python=warm / "python")
    found = read(out)
    assert [row["name"] for row in found["checks"]] == names
    ceiling, resumed, fsdp = found["checks"]
    assert (ceiling["result"], resumed["result"]) == ("ok", "ok")
    assert (resumed["figures"]["steps"], resumed["figures"]["loss off by"]) == (12, "0.0e+00")
    if not found["on_gpu"]:
        assert fsdp["result"] == "skipped: needs a GPU"
    table, _, rest = printed.partition("\n{")
    assert [line.split("  ")[0] for line in table.splitlines()] == names
    assert json.loads("{" + rest) == found


def test_gpu_ends_with_1_where_a_check_fails(out: Path, warm: Path) -> None:
    # out of time before the first step: the check has to fail by itself, and say so in one line
    words = ["--smallest", "--only", "speed recipe", "--limit", "0", "--json", str(out)]
    bench("gpu.py", *words, code=1, python=warm / "python")
    (row,) = read(out)["checks"]
    assert row["result"].startswith("FAILED: speed-recipe: not done within its time limit")


@pytest.mark.chaos  # for its time alone
def test_train_compares_with_a_bare_loop(warm: Path) -> None:
    sizes = ["--steps", "12", "--rounds", "1", "--hidden", "64", "--layers", "1", "--sequences", "4"]
    found = json.loads(bench("train.py", *sizes, "--json", python=warm / "python"))
    lengths = [f"{unit} at {length}" for length in (256, 512, 1024) for unit in ("steps/s", "tokens/s")]
    trainer = ["main.py steps/s", "bare loop steps/s", "main.py slower by", "data-wait share"]
    assert list(found) == [*trainer, *lengths, "matmul ceiling TFLOP/s", "model flops utilization"]
    assert all(found[name] > 0 for name in found if name != "main.py slower by")
    assert found["tokens/s at 512"] == pytest.approx(4 * 512 * found["steps/s at 512"])


@pytest.mark.chaos  # for its time alone
def test_loader_times_all_loaders(out: Path) -> None:
    sizes = ["--blocks", "600", "--seconds", "0.1", "--rounds", "1", "--workers", "0", "--starts", "0"]
    bench("loader.py", *sizes, "--json", str(out))
    found = read(out)
    for kind in ("blocks_per_second", "blocks_per_cpu_second"):
        speeds = {name: speed for name, speed in found[kind].items() if name != "mixture as a multiple of streaming"}
        assert list(speeds) == ["bare memory map", "mixture, 0 workers", "streaming, 0 workers"]
        assert all(speed > 0 for speed in speeds.values())


def test_hub_reads_the_same_rows_both_ways(out: Path) -> None:
    bench("hub.py", "--books", "5", "--megabytes", "0", "--json", str(out))
    assert {name: way["rows"] for name, way in read(out)["books"].items()} == {"ours": 5, "load_dataset": 5}


@pytest.mark.chaos
def test_convert_gives_the_same_ids_all_ways(tmp_path: Path, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"Lesson {number}: the water of a mountain river becomes light, energy and rain." for number in range(400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "lessons.parquet")
    (tmp_path / "tokenizer.json").write_text(spec())
    data = ["--data", str(tmp_path / "lessons.parquet"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    bench("convert.py", *data, "--megabytes", "1", "--rounds", "1", "--json", str(out))
    found = read(out)
    assert found["same_ids"]
    assert list(found["megabytes_per_second"]) == ["builder", "encode_batch_fast", "usual", "copying"]
    assert list(found["further"]) == ["text files", "conversations", "hub"]


@pytest.mark.chaos  # for its time alone
def test_scale_takes_every_case(out: Path) -> None:
    printed = bench("scale.py", "--scale", "0.002", "--json", str(out))
    found: list[dict[str, Any]] = json.loads(out.read_text())
    cases = ["parts", "streams", "text files", "line files", "index", "ranks", "lanes", "streams of a run"]
    assert list(dict.fromkeys(row["case"] for row in found)) == cases
    figures = {(row["case"], row["what"]): row["figures"] for row in found}
    assert figures["parts", "planned"]["parts"] == figures["parts", "all parts dispatched"]["accepted"] == 20
    assert figures["streams", "all parts dispatched"]["accepted"] == 6
    assert figures["index", "state saved and resumed from, and its batch"] == {"step": 500_000}
    assert figures["ranks", "opened, by each rank"]["blocks a step"] == 64
    assert len(printed.splitlines()) == len(found) + 1  # and its heads
    assert all(row["peak"] > 0 for row in found)
