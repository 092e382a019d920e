"""A checkpoint becomes a folder that `transformers` loads, with the same logits."""

from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from tests.train.conftest import weights_of
from train.export_hf import main, source_of
from train.main import main as train
from train.model import build_model
from train.settings import read_settings


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
    assert "after 5 steps on 2,560 tokens" in card  # 5 steps of 4 blocks of 128 tokens
    assert "| en_cosmopedia | 1,408 | 55.00% |" in card
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
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        main([str(tmp_path / "torn.pt"), str(tmp_path / "out")])
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
        ({"describe": {"files": [{"path": "/home/me/a|b.jsonl", "bytes": 1}]}}, "1 local file: a/b.jsonl"),
        (
            {"describe": {"files": [{"path": f"/home/me/{i}.parquet", "bytes": 1} for i in range(5)]}},
            "5 local files: 0.parquet, 1.parquet, 2.parquet, …",
        ),
        (
            {"describe": {"hub": "uonlp/CulturaX", "subset": "it", "split": "train", "revision": "0123456789abcdef"}},
            "uonlp/CulturaX (it, train) at 0123456789ab",
        ),
    ],
)
def test_a_card_names_sources_without_our_folders(source: object, words: str) -> None:
    assert source_of(source) == words
