"""A checkpoint becomes a folder that `transformers` loads, with the same logits."""

import json
from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from chimera.commands.export_hf import main
from chimera.commands.train import main as train
from chimera.train.data.shards import open_shards
from chimera.train.export.card import source_of
from chimera.train.settings import read_settings
from chimera.train.step.model import build_model
from tests.train.conftest import steps_of, weights_of


def test_a_checkpoint_loads_in_transformers_with_the_same_logits(overrides, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(overrides("run", "max_duration=5ba"))
    assert main([str(tmp_path / "run" / "latest-rank0.pt"), str(tmp_path / "out")]) == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = weights_of(tmp_path / "run", 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name

    file, *words = overrides("run")
    settings = read_settings(Path(file), words)
    trained = build_model(settings, vocab_size=model.config.vocab_size, eos_id=0, pad_id=1).eval()
    trained.load_state_dict(weights)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = model.eval()(ids).logits
        ours = trained({"input_ids": ids, "position_ids": torch.arange(40)[None]})
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert theirs.std() > 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Ciao"}, {"role": "assistant", "content": "Salve"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nCiao<|im_end|>\n<|im_start|>assistant\nSalve<|im_end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.eos_token == "<|endoftext|>"
    ends = model.generation_config.eos_token_id
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}

    words = tokenizer("Ciao", return_tensors="pt")
    assert model.generate(**words, max_new_tokens=2, min_new_tokens=2).shape[1] == words["input_ids"].shape[1] + 2

    card = (tmp_path / "out" / "README.md").read_text()
    steps = steps_of(tmp_path / "run")
    total = sum(step["tokens"] for step in steps)
    assert sum(step["positions"] for step in steps) == 2560  # 5 steps of 4 blocks of 128
    assert f"after 5 steps on {total:,} tokens" in card
    assert f"| en_cosmopedia | 1,408 | {1408 / total:.2%} |" in card  # 11 blocks without padding
    assert str(tmp_path.parent) not in card

    with pytest.raises(UserError, match="is not empty"):
        main([str(tmp_path / "run" / "latest-rank0.pt"), str(tmp_path / "out")])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_is_exported_in_half_precision(overrides, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    train(overrides("run", "max_duration=1ba"))
    assert main([str(tmp_path / "run/latest-rank0.pt"), str(tmp_path / "out"), "--dtype", dtype]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    weights = weights_of(tmp_path / "run", 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"].to(getattr(torch, dtype))), name


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        main([str(tmp_path / "none.pt"), str(tmp_path / "out")])
    for content in (b"PK\x03\x04 not really", b"junk", b"shards: ./shards\nrun_name: a\n", b""):
        (tmp_path / "torn.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a checkpoint that can be read") as refused:
            main([str(tmp_path / "torn.pt"), str(tmp_path / "out")])
        assert "weights_only" not in str(refused.value)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)]).state_dict()
    for foreign in ({"state": {"model": {}, "callbacks": {}}}, optimizer, {"state": [1]}):
        torch.save(foreign, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="not written by train/main"):
            main([str(tmp_path / "foreign.pt"), str(tmp_path / "out")])


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"state": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        main([str(tmp_path / "trap.pt"), str(tmp_path / "out")])
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ""),
        ({"describe": "theirs/en"}, "theirs/en"),
        ({"describe": {"files": [{"path": "/home/me/a|b.jsonl", "bytes": 1}]}}, r"1 local file: a\|b.jsonl"),
        (
            {"describe": {"files": [{"path": f"/home/me/{i}.parquet", "bytes": 1} for i in range(5)]}},
            "5 local files: 0.parquet, 1.parquet, 2.parquet, …",
        ),
        ({"describe": {"files": [], "texts": {"files": 61, "bytes": 17816}}}, "61 text files (17,816 bytes)"),
        (
            {"describe": {"files": [{"path": "a.csv", "bytes": 1}], "texts": {"files": 1, "bytes": 9}}},
            "1 local file: a.csv; 1 text file (9 bytes)",
        ),
        (
            {"describe": {"hub": "uonlp/CulturaX", "subset": "it", "split": "train", "revision": "0123456789abcdef"}},
            "uonlp/CulturaX (it, train) at 0123456789ab",
        ),
    ],
)
def test_a_card_names_sources_without_our_folders(source: object, words: str) -> None:
    assert source_of(source) == words


def test_texts_begin_in_training_generation_and_export_with_the_bos_of_their_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's kind with a BOS: no padding token, so that EOS fills blocks up, in the eval split too."""
    from transformers import AutoTokenizer

    from tests.convert import builds
    from tests.convert.encode.test_tokenizers import BOS, single, template, with_tokens_of
    from tests.train.conftest import ROOT, SMALL

    spec = with_tokens_of(single(), BOS)
    bos = spec["added_tokens"][-1]["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "post_processor": template((BOS, bos))}))
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 60)))
    build = {
        "output": f"{tmp_path}/shards",
        "tokenizer": {"path": f"{tmp_path}/tokenizer.json", "pad_token": None},
        "block_len": 128,
        "eval_fraction": 0.2,
        "streams": {"web": {"sources": [{"files": [f"{tmp_path}/rows.jsonl"]}]}},
    }
    assert builds.build_here(build)["streams"]["web"]["eval"]["padding"] > 0
    config = [
        *(str(ROOT / "yamls/demo/base.yaml"), *SMALL, f"shards={tmp_path}/shards", f"cache={tmp_path}/cache"),
        *(f"save_folder={tmp_path}/run", "phases=[{name: all, steps: 2, proportions: {web: 1}}]", "eval.interval=1"),
        *(
            "scheduler.warmup_steps=0",
            "scheduler.decay_steps=1",
            "generate={interval: 2, prompts: [Ciao], max_new_tokens: 2}",
            "max_passes=1000",
        ),
    ]
    assert train(config) == 0
    assert "step 2: 'Ciao' → " in capsys.readouterr().err
    assert main([str(tmp_path / "run" / "latest-rank0.pt"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = tokenizer("Ciao")["input_ids"]
    assert theirs[0] == bos
    assert theirs == open_shards(f"{tmp_path}/shards", "").tokenizer.encode("Ciao")
    assert tokenizer.pad_token is None
