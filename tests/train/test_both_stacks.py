"""The older and the newer stack make the same shards, go on from each other's checkpoints and read their exports.

Needs the other stack's Python beside this one: `make test-oldest` has both, as has `OTHER_PYTHON=…`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from chimera.commands import export_hf
from chimera.commands.train import main
from chimera.versions import dtype_keyword
from tests.train.conftest import ROOT, steps_of

SIBLINGS = [ROOT / folder / "bin/python" for folder in (".venv", ".venv-oldest")]
OTHERS = [path for path in SIBLINGS if path.exists() and path.parent != Path(sys.executable).parent]
OTHER = os.environ.get("OTHER_PYTHON") or (str(OTHERS[0]) if OTHERS else None)
pytestmark = pytest.mark.skipif(OTHER is None, reason="one stack alone is installed: see `make test-oldest`")

THETA = "rope_theta: 5000.0, rope_scaling: {rope_type: llama3, factor: 4.0, low_freq_factor: 1.0,"
THETA += " high_freq_factor: 4.0, original_max_position_embeddings: 32}"
SIZES = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
MODELS = {
    "llama": f"{{model_type: llama, {SIZES}, num_key_value_heads: 2, max_position_embeddings: 128, {THETA}}}",
    "yarn": f"{{model_type: qwen3, {SIZES}, num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 128,"
    " rope_scaling: {rope_type: yarn, factor: 4.0}}",
    "gemma3_text": f"{{model_type: gemma3_text, {SIZES}, num_key_value_heads: 2, head_dim: 8, sliding_window: 16,"
    " max_position_embeddings: 128, rope_theta: 7000.0, rope_local_base_freq: 300.0}",
    "phi": f"{{model_type: phi, {SIZES}, partial_rotary_factor: 0.25, rope_theta: 900.0}}",
}

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Ciao <|im_end|>"}, {"role": "assistant", "content": "Salve"}]
with torch.no_grad():
    logits = model(torch.arange(100)[None]).logits[0]
json.dump({
    "logits": logits.tolist(), "ids": tokenizer("L'acqua bolle a 100 gradi").input_ids,
    "chat": tokenizer.apply_chat_template(chat, tokenize=False), "type": str(model.dtype),
    "ends": model.generation_config.eos_token_id, "pad": tokenizer.pad_token_id,
}, sys.stdout)
"""


def other(*words: str, fails: bool = False) -> str:
    """What a command of this checkout says on the other stack."""
    done = subprocess.run([str(OTHER), *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else done.stdout


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def test_shards_are_the_same_bytes(demo_shards: Path, tmp_path: Path) -> None:
    config = [f"tokenizer.path={demo_shards.parent}/tokenizer", f"output={tmp_path}/shards"]
    for stream, file in (
        ("en_cosmopedia", "en_lessons.parquet"),
        ("it_culturax", "it_pages.parquet"),
        ("it_instructions", "it_pairs.jsonl"),
    ):
        config.append(f"streams.{stream}.sources=[{{files: ['{ROOT}/samples/{file}']}}]")
    other("convert/build_shards.py", "yamls/demo/shards.yaml", *config)
    assert tree(tmp_path / "shards") == tree(demo_shards)


def test_a_run_goes_on_across_stacks_and_back(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    model = f"model={MODELS['llama']}"
    main(overrides("whole", model))
    config = overrides("run", model)
    main([*config, "max_duration=10ba"])
    other("train/main.py", *config, "max_duration=20ba")
    said = other("train/main.py", *config, "model.rope_theta=10000.0", fails=True)
    assert "rope_theta is 10000.0, the checkpoint (step 20) was trained with 5000.0" in said
    with pytest.raises(UserError, match=r"rope_theta is 10000.0, .* was trained with 5000.0"):
        main([*config, "model.rope_theta=10000.0"])
    main(config)
    for ours, theirs in zip(steps_of(tmp_path / "run"), steps_of(tmp_path / "whole"), strict=True):
        assert ours["digest"] == theirs["digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
    starts = (tmp_path / "run/starts.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["versions"]) for line in starts}) == 2


@pytest.mark.parametrize("name", MODELS)
def test_exports_are_read_alike(overrides: Callable[..., list[str]], tmp_path: Path, warm: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    main(overrides("run", f"model={MODELS[name]}", "max_duration=2ba"))
    checkpoint = f"{tmp_path}/run/latest-rank0.pt"
    export_hf.main([checkpoint, f"{tmp_path}/here"])
    other("train/export_hf.py", checkpoint, f"{tmp_path}/there")  # the checkpoint too is of this stack
    ids = torch.arange(100)[None]
    weights = {dtype_keyword(): torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "here", **weights).eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "there", **weights).eval()
    with torch.no_grad():
        logits, theirs = model(ids).logits[0], again(ids).logits[0]
    assert torch.allclose(theirs, logits, atol=1e-5)
    (tmp_path / "read.py").write_text(READ)
    read = {folder: json.loads(other(f"{tmp_path}/read.py", f"{tmp_path}/{folder}")) for folder in ("here", "there")}
    for found in read.values():
        assert torch.allclose(torch.tensor(found.pop("logits")), logits, atol=1e-5)
    mine = subprocess.run([warm / "python", "-c", READ, str(tmp_path / "there")], capture_output=True, check=True)
    here = json.loads(mine.stdout)
    del here["logits"]
    assert read["here"] == read["there"] == here


def test_weights_that_the_other_stack_names_otherwise_are_one_line(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The head of GPT-NeoX is `embed_out` to transformers 4 and `lm_head` to 5."""
    config = overrides("run", f"model={{model_type: gpt_neox, {SIZES}, num_key_value_heads: null, rotary_pct: 0.5}}")
    main([*config, "max_duration=1ba"])
    for words in (
        ["train/main.py", *config],
        ["train/export_hf.py", f"{tmp_path}/run/latest-rank0.pt", f"{tmp_path}/x"],
    ):
        said = other(*words, fails=True)
        assert "error: the weights have other names than in the checkpoint (step 1)" in said
        assert "Traceback" not in said


def test_an_export_is_trained_on_in_the_other_stack(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    main(overrides("run", f"model={MODELS['llama']}", "max_duration=1ba"))
    export_hf.main([f"{tmp_path}/run/latest-rank0.pt", f"{tmp_path}/base"])
    sizes = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = [f"model.{key}=null" for key in (*sizes, "num_key_value_heads", "attention_dropout")]
    more += [f"model={{pretrained: {tmp_path}/base, rope_theta: 5000.0}}", "max_duration=2ba"]
    main(overrides("here", *more))
    other("train/main.py", *overrides("there", *more))
    for ours, theirs in zip(steps_of(tmp_path / "there"), steps_of(tmp_path / "here"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
