"""Training on real shards with Composer itself: phases, stages, stops and resumes, all in one process."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from chimera.commands import export_hf
from chimera.commands.train import main
from chimera.train.run.checkpoint_file import damage_of, read_checkpoint
from chimera.train.step import collate
from tests.train.conftest import steps_of, weights_of


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def whole(overrides, tmp_path):
    """An uninterrupted run of both phases."""
    main(overrides("whole"))
    return tmp_path / "whole"


def test_phases_as_files_stops_and_one_run_give_the_same_weights(whole, overrides, tmp_path):
    reference = steps_of(whole)
    assert [line["step"] for line in reference] == list(range(30))
    assert [line["seq_len"] for line in reference] == [32] * 8 + [64] * 8 + [128] * 14
    assert [line["phase"] for line in reference] == ["knowledge"] * 20 + ["alignment"] * 10

    # stopped in a stage, at a stage's edge and at the phase's edge; read by another number of workers each time
    for until, workers in ((7, 1), (16, 0), (20, 2), (30, 0)):
        main(overrides("parts", f"max_duration={until}ba", f"num_workers={workers}"))
    assert steps_of(tmp_path / "parts") == reference
    assert same(weights_of(tmp_path / "parts", 30), weights_of(whole, 30))

    # the realized mix is within one block of its target at every step
    shares = {"en_cosmopedia": 0.55, "it_culturax": 0.35, "it_instructions": 0.1}
    seen = dict.fromkeys(shares, 0)
    for line in reference[:20]:
        for name in shares:
            seen[name] += line["streams"][name] // 128
        for name, share in shares.items():
            assert abs(seen[name] - share * sum(seen.values())) < 1

    # a finished run says so and changes nothing
    before = (tmp_path / "parts" / "steps.jsonl").read_bytes()
    assert main(overrides("parts")) == 0
    assert (tmp_path / "parts" / "steps.jsonl").read_bytes() == before


def test_a_run_resumed_in_a_phase_of_another_batch_cuts_it_as_the_uninterrupted_one(overrides, tmp_path):
    shares = "proportions: {en_cosmopedia: 0.5, it_culturax: 0.5}"
    config = [
        f"phases=[{{name: small, steps: 4, global_train_batch_size: 8, {shares}}},"
        f" {{name: large, steps: 6, global_train_batch_size: 16, {shares}}}]",
        "curriculum.stages=[{from_step: 0, seq_len: 32}]",
        "scheduler.decay_steps=2",
    ]
    main(overrides("whole", *config))
    for until in (7, 10):
        main(overrides("parts", *config, f"max_duration={until}ba"))
    assert same(weights_of(tmp_path / "parts", 10), weights_of(tmp_path / "whole", 10))
    metrics = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["trainer/device_train_microbatch_size"] for line in metrics] == [8] * 4 + [16] * 6


def test_history_cannot_change_but_the_future_can(overrides, tmp_path):
    main(overrides("run", "max_duration=20ba"))
    other = "phases.{}.proportions={{en_cosmopedia: 0.5, it_culturax: 0.4, it_instructions: 0.1}}"
    with pytest.raises(UserError, match=r"proportions at step 0 .*0\.5|proportions at step 0"):
        main(overrides("run", other.format(0)))
    with pytest.raises(UserError, match="seed"):
        main(overrides("run", "seed=18"))
    assert len(steps_of(tmp_path / "run")) == 20
    main(overrides("run", other.format(1)))
    last = steps_of(tmp_path / "run")[20:]
    blocks = {name: sum(line["streams"][name] for line in last) // 128 for name in last[0]["streams"]}
    assert blocks == {"en_cosmopedia": 80, "it_culturax": 64, "it_instructions": 16}


def test_a_finished_plan_can_be_prolonged(overrides, tmp_path):
    main(overrides("run", "phases.1.steps=4", "scheduler.name=constant", "scheduler.decay_steps=0"))
    main(overrides("run", "scheduler.name=constant", "scheduler.decay_steps=0"))
    main(overrides("once", "scheduler.name=constant", "scheduler.decay_steps=0"))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "once")


def test_a_damaged_latest_checkpoint_is_passed_over(whole, overrides, capsys):
    newest = whole / "ep0-ba30-rank0.pt"
    reference, weights = steps_of(whole), weights_of(whole, 30)
    newest.write_bytes(newest.read_bytes()[:20_000])
    main(overrides("whole"))
    assert "ep0-ba30-rank0.pt is damaged" in capsys.readouterr().err
    assert steps_of(whole) == reference
    assert same(weights_of(whole, 30), weights)


def test_a_branch_starts_from_a_checkpoint_of_any_name(whole, overrides, tmp_path, capsys):
    start = tmp_path / "start.pt"
    start.write_bytes((whole / "ep0-ba20-rank0.pt").read_bytes())
    config = overrides("branch", f"load_path={start}", "min_start_step=20")
    main([*config, "max_duration=25ba"])
    assert "starting at step 20 of 25" in capsys.readouterr().err
    main(config)  # the same command goes on in the branch
    assert f"starting at step 25 of 30 from {tmp_path}/branch/ep0-ba25-rank0.pt" in capsys.readouterr().err
    lines = steps_of(tmp_path / "branch")
    named = lines[0].pop("parent")
    assert (named["address"], named["step"], named["run_name"]) == (str(start), 20, "demo")
    assert lines == steps_of(whole)[20:]
    assert same(weights_of(tmp_path / "branch", 30), weights_of(whole, 30))
    with pytest.raises(UserError, match=r"this config starts at step 21 or later.* is at step 20"):
        main(overrides("other", f"load_path={start}", "min_start_step=21"))


def test_a_checkpoint_of_another_model_loss_or_mask_is_refused(overrides, tmp_path, capsys):
    main(overrides("run", "max_duration=5ba"))
    start = f"load_path={tmp_path}/run/ep0-ba5-rank0.pt"
    for change, key, now, was in (
        ("model.num_hidden_layers=1", "num_hidden_layers", 1, 2),
        ("model.num_attention_heads=4", "num_attention_heads", 4, 2),
        ("model.rope_theta=5000", "rope_theta", "5000", "10000.0"),
        ("model.hidden_size=64", "hidden_size", 64, 32),
    ):
        for where in (("run",), ("branch", start)):
            with pytest.raises(
                UserError, match=rf"`model`: {key} is {now}, the checkpoint \(step 5\) was trained with {was}: set it"
            ):
                main(overrides(*where, change))
    for change in ("train_on=assistant", "document_mask=false"):
        with pytest.raises(UserError, match=rf"`{change.replace('=', '` is ')}, the checkpoint \(step 5\)"):
            main(overrides("run", change))
    capsys.readouterr()
    changes = ("train_on=assistant", "model.attention_dropout=0.2", "model.max_position_embeddings=512")
    main(overrides("branch", start, *changes, "max_duration=6ba"))
    assert (
        "`train_on` is assistant from here on; the checkpoint (step 5) was trained with all" in capsys.readouterr().err
    )


def test_a_branch_takes_no_line_of_what_its_folder_held_for_its_own(overrides, tmp_path, capsys):
    main(overrides("other", "max_duration=5ba"))
    main(overrides("run", "max_duration=6ba", "seed=18"))  # as if killed before its first checkpoint
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink()
    main(overrides("run", f"load_path={tmp_path}/other/ep0-ba5-rank0.pt", "max_duration=7ba"))
    said = capsys.readouterr().err
    for name, kept, of_its_own in (("steps", 6, 2), ("metrics", 6, 2), ("starts", 1, 1)):
        assert f"elsewhere: the {name}.jsonl of before is kept as {name}.jsonl.old" in said
        for suffix, count in (("jsonl.old", kept), ("jsonl", of_its_own)):
            assert len((tmp_path / f"run/{name}.{suffix}").read_text().splitlines()) == count
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [5, 6]


def test_the_newest_checkpoints_are_kept_and_latest_is_the_newest(overrides, tmp_path):
    for until in (15, 30):  # the second start removes files of the first
        main(overrides("run", "save_keep=2", f"max_duration={until}ba"))
        kept = [f"ep0-ba{until - 5}-rank0.pt", f"ep0-ba{until}-rank0.pt"]
        files = {path.name for path in (tmp_path / "run").glob("*.pt")}
        assert files == {*kept, "latest-rank0.pt"}
        latest = (tmp_path / "run/latest-rank0.pt").resolve()
        assert latest.name == kept[-1]
        assert damage_of(latest) is None


def test_a_loss_that_is_not_finite_stops_with_step_and_batch(overrides, tmp_path):
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) at step \d+ \(phase knowledge.*inspect_batch"
    ) as caught:
        main(overrides("run", "optimizer.lr=1e30", "optimizer.clip_norm=null", "scheduler.warmup_steps=0"))
    stopped = steps_of(tmp_path / "run")
    assert f"at step {len(stopped)} " in str(caught.value)


def test_weights_that_are_not_finite_are_not_saved(overrides, tmp_path):
    """The step that spoils them has a finite loss; its checkpoint would be whole, and every start from it fail."""
    wild = ("optimizer.lr=1e37", "optimizer.clip_norm=null", "save_interval=1", "scheduler={name: constant}")
    with pytest.raises(UserError, match=r"(weights are not finite after|the loss is \w+ at) step"):
        main(overrides("wild", *wild))
    saved = list((tmp_path / "wild").glob("ep0-*.pt"))
    assert saved
    assert all(tensor.isfinite().all() for path in saved for tensor in read_checkpoint(path)["model"].values())


def test_evaluation_and_generation_leave_the_run_as_it_is(whole, overrides, tmp_path, capsys):
    capsys.readouterr()
    generate = "generate={interval: 9, prompts: ['The water', 'La luce'], max_new_tokens: 3}"
    main(overrides("evaluated", "eval={interval: 6, blocks: 5, seq_lens: [64]}", generate))
    said = capsys.readouterr().err
    for step in (9, 18, 27):
        assert f"step {step}: 'The water' → " in said
        assert f"step {step}: 'La luce' → " in said
    assert steps_of(tmp_path / "evaluated") == steps_of(whole)
    assert same(weights_of(tmp_path / "evaluated", 30), weights_of(whole, 30))
    lines = [json.loads(line) for line in (tmp_path / "evaluated" / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line for line in lines if "metrics/eval/it_culturax/64/loss" in line}
    assert sorted(measured) == [5, 11, 17, 23, 29]
    last = measured[29]
    for stream in ("en_cosmopedia", "it_culturax", "it_instructions"):
        loss, perplexity = (last[f"metrics/eval/{stream}/64/{name}"] for name in ("loss", "perplexity"))
        assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    assert all(0 < line["data/wait_share"] < 1 for line in lines)
    assert all(line["throughput/tokens_per_sec"] > 0 for line in lines[10:])


def test_mode_tokens_keeps_the_tokens_of_a_step(overrides, tmp_path):
    main(overrides("run", "curriculum.mode=tokens", "device_train_microbatch_tokens=256", "max_duration=18ba"))
    lines = steps_of(tmp_path / "run")
    assert [line["seq_len"] for line in lines] == [32] * 8 + [64] * 8 + [128] * 2
    assert {line["positions"] for line in lines} == {16 * 128}
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["trainer/device_train_microbatch_size"] for line in metrics] == [8] * 8 + [4] * 8 + [2] * 2


def test_activation_checkpointing_changes_nothing_but_memory(overrides, tmp_path):
    config = ["model.attention_dropout=0.0", "max_duration=10ba"]
    main(overrides("plain", *config))
    main(overrides("checkpointed", *config, "activation_checkpointing=true"))
    for ours, theirs in zip(steps_of(tmp_path / "checkpointed"), steps_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it trains on a GPU")
def test_a_precision_that_needs_a_gpu_is_refused_without_one(overrides):
    with pytest.raises(UserError, match="`precision: amp_bf16` needs a GPU"):
        main(overrides("run", "precision=amp_bf16"))


def test_microbatches_change_the_loss_by_float_error_only(overrides, tmp_path):
    no_dropout = "model.attention_dropout=0.0"
    main(overrides("one", no_dropout, "max_duration=12ba"))
    main(overrides("many", no_dropout, "max_duration=12ba", "device_train_microbatch_tokens=128"))
    for a, b in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "many"), strict=True):
        assert a["digest"] == b["digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_auto_finds_the_microbatch_that_fits_and_keeps_the_loss(overrides, tmp_path, monkeypatch):
    """Composer's search, which is for a GPU, with its refusal of a CPU lifted: more than 256 tokens are too many."""
    import composer.trainer.trainer as trainer

    from chimera.train.run import curriculum
    from chimera.train.step.model import CausalLM

    less = ["model.attention_dropout=0.0", "max_duration=20ba"]
    main(overrides("whole", *less))
    shapes, forward = [], CausalLM.forward

    def limited(self, batch):
        if self.training:
            shapes.append(tuple(batch["input_ids"].shape))
        if batch["input_ids"].numel() > 256:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(CausalLM, "forward", limited)
    monkeypatch.setattr(trainer, "_is_auto_microbatching", lambda size, **_: size == "auto")
    monkeypatch.setattr(curriculum, "microbatch", lambda *_: None)
    main(overrides("auto", *less))
    assert shapes[:3] == [(1, 128), (16, 32), (8, 32)], "the longest stage is tried; the whole batch, then half of it"
    assert set(shapes[3:]) == {(8, 32), (4, 64), (2, 128)}, "what was found in tokens holds at every length"
    for auto, whole in zip(steps_of(tmp_path / "auto"), steps_of(tmp_path / "whole"), strict=True):
        assert auto["digest"] == whole["digest"]
        assert auto["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_each_step_trains_with_its_own_learning_rate_and_the_configs_optimizer(overrides, tmp_path):
    main(overrides("run", "max_duration=5ba"))
    main(overrides("run", "optimizer.lr=0.01", "optimizer.weight_decay=0.1"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr-DecoupledAdamW/group0"] for line in lines]
    lr = 0.003  # yamls/demo/base.yaml
    assert rates[:5] == pytest.approx([lr / 3, 2 * lr / 3, lr, lr, lr])
    assert rates[5:20] == pytest.approx([0.01] * 15)
    assert rates[29] == pytest.approx(0.001), "the last step reaches `final`"
    groups = read_checkpoint(tmp_path / "run/ep0-ba30-rank0.pt")["optimizers"]["DecoupledAdamW"]["param_groups"]
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.1), (0.01, 0.0)]


@pytest.mark.chaos  # not for its kills, but because compiling takes long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_trains_as_the_plain_one_with_few_graphs(overrides, tmp_path):
    config = ["model.attention_dropout=0.0", "model.num_hidden_layers=1", "max_duration=18ba"]  # three lengths
    main(overrides("plain", *config))
    main(overrides("compiled", *config, "compile=true"))
    for ours, theirs in zip(steps_of(tmp_path / "compiled"), steps_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    metrics = [json.loads(line) for line in (tmp_path / "compiled/metrics.jsonl").read_text().splitlines()]
    graphs = [line["curriculum/compiled_graphs"] for line in metrics if "curriculum/compiled_graphs" in line]
    assert 1 <= graphs[-1] <= 3  # one of fixed length, one of any length


def test_training_on_what_the_assistant_says_only(overrides, tmp_path):
    main(overrides("run", "train_on=assistant", "max_duration=6ba"))
    main(overrides("all", "max_duration=6ba"))
    some, everything = steps_of(tmp_path / "run"), steps_of(tmp_path / "all")
    assert [line["digest"] for line in some] == [line["digest"] for line in everything]
    chat = [line["streams"]["it_instructions"] > 0 for line in everything]
    first = chat.index(True)
    assert some[:first] == everything[:first]  # text is trained in full
    assert some[first]["loss"] != everything[first]["loss"]


def test_a_step_without_a_trained_token_leaves_the_weights_to_decay_alone(overrides, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collate, "document_starts", lambda ids, *_: torch.ones_like(ids, dtype=torch.bool))
        main(overrides("run", "max_duration=3ba", "document_mask=false"))
    assert [line["loss"] for line in steps_of(tmp_path / "run")] == [None, None, None]


def test_a_stream_without_a_share_in_any_phase_is_no_matter(overrides, tmp_path):
    none = ["phases.0.proportions={en_cosmopedia: 0.6, it_culturax: 0.4, it_instructions: 0}"]
    none += ["phases.1.proportions={en_cosmopedia: 0.5, it_culturax: 0.5, it_instructions: 0.0}", "max_duration=2ba"]
    main(overrides("run", *none))
    assert set(steps_of(tmp_path / "run")[0]["streams"]) == {"en_cosmopedia", "it_culturax"}


def test_a_model_folder_with_another_tokenizer_is_refused(overrides, tmp_path):
    main(overrides("run", "max_duration=2ba"))
    export_hf.main([str(tmp_path / "run/ep0-ba2-rank0.pt"), str(tmp_path / "exported")])
    main(overrides("again", f"model.pretrained={tmp_path}/exported", "max_duration=2ba"))
    file = tmp_path / "exported/tokenizer.json"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    one, other = [token for token in vocab if len(token) > 2][-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"2 of its \d+ tokens have another id"):
        main(overrides("other", f"model.pretrained={tmp_path}/exported"))


def test_a_model_that_cannot_tell_documents_apart_is_refused(overrides):
    other = ["model.model_type=biogpt", "model.num_key_value_heads=null", "model.attention_dropout=null"]
    other.append("max_duration=1ba")
    with pytest.raises(UserError, match="no effect on `biogpt`"):
        main(overrides("run", *other))
    main(overrides("unmasked", *other, "document_mask=false"))


def test_a_model_that_is_not_causal_is_refused(overrides):
    model = "model={model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"
    base = ["model.num_key_value_heads=null", "model.attention_dropout=null"]
    for mask in ("true", "false"):
        with pytest.raises(UserError, match="a `bert` model sees the tokens that follow"):
            main(overrides("run", model, *base, f"document_mask={mask}"))


GPT2 = [
    "model={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, hidden_size: null, intermediate_size: null,"
    " num_hidden_layers: null, num_attention_heads: null, num_key_value_heads: null, attention_dropout: null,"
    " max_position_embeddings: null, tie_word_embeddings: true}",
    "document_mask=false",
]


def test_a_table_of_positions_shorter_than_a_stage_is_refused(overrides):
    with pytest.raises(UserError, match=r"a model with a table of positions .* takes no longer"):
        main(overrides("run", *GPT2, "model.n_positions=64", "beyond_positions=true"))


def test_a_table_of_positions_shorter_than_an_evaluation_is_refused_before_the_first_step(overrides, tmp_path):
    stages = "curriculum.stages=[{from_step: 0, seq_len: 32}]"
    longer = ["eval.interval=2", "eval.blocks=1", "eval.seq_lens=[32,64]"]
    with pytest.raises(UserError, match=r"a model with a table of positions .* takes no longer"):
        main(overrides("run", *GPT2, "model.n_positions=32", stages, *longer))
    assert not (tmp_path / "run/steps.jsonl").read_text()


def test_a_model_of_few_positions_is_exported(overrides, tmp_path):
    stages = "curriculum.stages=[{from_step: 0, seq_len: 32}]"
    main(overrides("run", *GPT2, "model.n_positions=32", stages, "max_duration=1ba"))
    assert export_hf.main([str(tmp_path / "run/ep0-ba1-rank0.pt"), str(tmp_path / "out")]) == 0


def test_generation_past_the_last_position_is_refused_before_the_first_step(overrides, tmp_path):
    config = overrides("run", *GPT2, "model.n_positions=128", "max_duration=2ba")
    with pytest.raises(
        UserError, match=r"prompt 'The water' has \d+ tokens, with `max_new_tokens` 127 .* 128 positions"
    ):
        main([*config, "generate={interval: 1, prompts: ['The water'], max_new_tokens: 127}"])
    assert not steps_of(tmp_path / "run")
    assert main([*config, "generate={interval: 1, prompts: ['The water'], max_new_tokens: 120}"]) == 0


def test_another_tokenizer_than_the_shards_is_refused(overrides, demo_shards, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((demo_shards / "tokenizer/tokenizer.json").read_text().replace("the", "eht", 1))
    with pytest.raises(UserError, match=r"tokenizer.json \([0-9a-f]{12}\) is not the tokenizer the shards"):
        main(overrides("run", f"tokenizer={other}"))
    assert main(overrides("run", f"tokenizer={demo_shards}/tokenizer", "max_duration=1ba")) == 0


def test_single_documents_are_padded_to_the_longest_and_what_the_length_parts_is_logged(
    overrides, demo_shards, tmp_path
):
    from chimera.commands import build_shards
    from tests.train.conftest import ROOT

    source = f"[{{files: ['{ROOT}/samples/it_pairs.jsonl']}}]"
    build_shards.main(
        [
            str(ROOT / "yamls/demo/shards.yaml"),
            f"tokenizer.path={demo_shards}/tokenizer",
            f"output={tmp_path}/shards",
            f"streams={{pairs: {{format: chatml, packing: none, sources: {source}}}}}",
        ]
    )
    main(
        [
            *overrides("run"),
            f"shards={tmp_path}/shards",
            "phases=[{name: only, steps: 12, proportions: {pairs: 1}}]",
            "curriculum.stages=[{from_step: 0, seq_len: 32}, {from_step: 6, seq_len: 128}]",
            "scheduler.decay_steps=2",
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["data/tokens_parted_from_their_document"] > 0 for line in lines[:6])
    assert all("data/tokens_parted_from_their_document" not in line for line in lines[6:])


def test_more_shards_in_use_than_files_may_be_open_at_first(overrides, demo_shards, tmp_path):
    from chimera.commands import build_shards
    from tests.train.conftest import ROOT

    source = f"[{{files: ['{ROOT}/samples/it_pairs.jsonl']}}]"
    build_shards.main(
        [
            str(ROOT / "yamls/demo/shards.yaml"),
            f"tokenizer.path={demo_shards}/tokenizer",
            f"output={tmp_path}/shards",
            f"streams={{pairs: {{format: chatml, sources: {source}}}}}",
            "shard_bytes=2048",
            "compression=null",
        ]
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        only = ["phases=[{name: only, steps: 12, proportions: {pairs: 1}}]", "scheduler.decay_steps=2"]
        assert main([*overrides("run"), f"shards={tmp_path}/shards", *only]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_running_out_of_memory_at_the_longest_stage_shows_before_the_first_step(overrides, tmp_path):
    """The address space is limited to 1 GB more than now; logits of 2 048 tokens × 300 000 ids take 2.4 GB."""
    config = overrides("run", "model.vocab_size=300000", "model.hidden_size=16", "model.intermediate_size=16")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out of memory at the longest stage ahead: 16 sequences of 128 tokens"):
            main(config)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not steps_of(tmp_path / "run")
    assert main([*config, "device_train_microbatch_tokens=256", "max_duration=1ba"]) == 0
