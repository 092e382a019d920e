"""Names and texts of others steer nothing that a run shows, and no secret of the environment is in what it leaves."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from chimera.commands import export_hf, inspect_batch, plan, report, train, verify_shards
from tests.convert import builds
from tests.test_hostile import HOSTILE, STEERS

CANARY = "canary-3f9a1c"
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "S3_KEY",
    "GCS_SECRET",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "MY_TOKEN",
)


def test_a_build_a_run_and_its_export_hold_no_secret_and_steer_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    (tmp_path / "texts.jsonl").write_bytes(builds.jsonl({"text": f"{HOSTILE} {text}"} for text in builds.texts(1, 40)))
    streams = {"texts": {"min_chars": 0, "sources": [{"files": [f"{tmp_path}/texts.jsonl"]}]}}
    builds.build_here(builds.config(tmp_path, tmp_path / "shards", streams=streams))
    phase = HOSTILE.replace("\n", "\\n").replace('"', "") + "$\\frac{<script>alert(1)</script>"
    words = [
        f"phases=[{{name: {as_yaml(phase)}, steps: 2, proportions: {{texts: 1}}}}]",
        "curriculum.stages=[{from_step: 0, seq_len: 64}]",
        "model={hidden_size: 32, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 1}",
        f"generate={{interval: 2, prompts: [{as_yaml(HOSTILE)}], max_new_tokens: 8}}",
        *("eval={interval: 2, blocks: 4}", "save_interval=2", "global_train_batch_size=2", "run_name='*a* [b](c)'"),
        *(
            f"{key}={tmp_path}/{folder}"
            for key, folder in (("shards", "shards"), ("cache", "cache"), ("save_folder", "run"))
        ),
        "scheduler={name: constant, warmup_steps: 0, decay_steps: 0}",
    ]
    config = [str(Path(__file__).parents[2] / "yamls/demo/base.yaml"), *words]
    train.main(config)
    commands: list[tuple[Callable[..., int], list[str]]] = [
        (verify_shards.main, [f"{tmp_path}/shards"]),
        (plan.main, [*config, "--plot", f"{tmp_path}/plan.png"]),
        (inspect_batch.main, [*config, "step=1", "--decode"]),
        (inspect_batch.main, [*config, "step=1", "--mask", "--json"]),
        (report.main, [f"{tmp_path}/run"]),
        (export_hf.main, [f"{tmp_path}/run/ep0-ba2-rank0.pt", f"{tmp_path}/out"]),
    ]
    for command, given in commands:
        assert command(given) == 0
    said = capfd.readouterr()
    for shown in (said.out, said.err):
        assert not STEERS.search(shown.replace("\r", ""))  # of the progress bars of transformers
        assert CANARY not in shown
    assert "step 2: " in said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    for name in ("run/report.html", "out/README.md", "shards/manifest.json", "run/steps.jsonl"):
        written = (tmp_path / name).read_text()
        assert not STEERS.search(written)
        assert "<script" not in written or name.endswith(".jsonl")
    assert re.match(r"# \\\*a\\\* \\\[b\\\]\(c\)\n", (tmp_path / "out/README.md").read_text())


def as_yaml(text: str) -> str:
    """A text in quotes of YAML."""
    escaped = "".join(c if c.isalnum() or c in " $<>()/" else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'
