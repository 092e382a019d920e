"""evaluate.py: the numbers of the run's own evaluation, from the checkpoint alone."""

import json

import pytest
import torch

from chimera.cli import UserError
from chimera.commands import evaluate, train
from chimera.train.data.state import StateMismatch
from chimera.train.history.page import page
from chimera.train.history.run_files import read_run

STREAMS = {"en_cosmopedia", "it_culturax", "it_instructions"}


def test_a_checkpoint_has_the_numbers_that_its_run_logged(overrides, tmp_path, capsys):
    phases = "phases=[{name: a, steps: 30, proportions: {en_cosmopedia: 0.6, it_culturax: 0.4}}]"
    evaluated = f"eval={{interval: 4, blocks: 5, streams: [{', '.join(sorted(STREAMS))}]}}"  # one that none trains on
    config = overrides("run", phases, evaluated, "max_duration=4ba", "save_interval=4")
    train.main(config)
    run = read_run(tmp_path / "run")
    assert (run.only_evaluated, {*run.evaluated}) == (["it_instructions"], STREAMS)
    assert "it_instructions" in page(run, [], None).partition("Loss of each stream")[2].partition("</table>")[0]
    checkpoint = str(tmp_path / "run/latest-rank0.pt")
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[3])

    capsys.readouterr()
    assert evaluate.main([checkpoint, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["checkpoint"], found["step"], set(found["streams"])) == (checkpoint, 4, STREAMS)
    for stream, lengths in found["streams"].items():
        assert set(lengths) == {"32", "64", "128"}
        for seq_len, values in lengths.items():
            for name in ("loss", "perplexity"):
                assert values[name] == pytest.approx(logged[f"metrics/eval/{stream}/{seq_len}/{name}"], rel=1e-6)
            assert 0 < values["tokens"] < 5 * 128
    assert evaluate.main([checkpoint, *config, "eval={interval: 0, seq_lens: [128]}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{checkpoint}: after 4 steps"
    for stream, lengths in found["streams"].items():
        values = lengths["128"]
        numbers = [f"{values['loss']:.3f}", f"{values['perplexity']:.3f}", str(values["tokens"])]
        assert [stream, "128", *numbers] in [line.split() for line in printed]

    with pytest.raises(StateMismatch, match=r"setting `model`: hidden_size is 16, the checkpoint \(step 4\) was"):
        evaluate.main([checkpoint, "model.hidden_size=16"])
    with pytest.raises(UserError, match=r"setting `eval.seq_lens`: sequences of 48 tokens do not divide blocks of 128"):
        evaluate.main([checkpoint, "eval.seq_lens=[48]"])
    with pytest.raises(
        UserError, match=r"setting `eval.streams`: stream `de` is not in the shards at .*, which hold en_"
    ):
        evaluate.main([checkpoint, "eval.streams=[de]"])
    with pytest.raises(UserError, match=r"config.json: setting `eval.bloks` is unknown: is `blocks` meant"):
        evaluate.main([checkpoint, "eval.bloks=1"])

    other = torch.load(checkpoint, weights_only=False)
    callbacks = dict(other["state"]["callbacks"])
    callbacks["About"]["about"]["eos_token"] = "</s>"
    callbacks["About"]["about"]["tokenizer"] = "{}"
    (tmp_path / "away").mkdir()
    torch.save(other, tmp_path / "away/other.pt")
    with pytest.raises(UserError, match=r"no config\.json beside .*other\.pt: give the CONFIG of its run"):
        evaluate.main([str(tmp_path / "away/other.pt")])
    with pytest.raises(StateMismatch, match=r"the tokenizer is not the one the checkpoint \(step 4\) was trained with"):
        evaluate.main([str(tmp_path / "away/other.pt"), *config])
