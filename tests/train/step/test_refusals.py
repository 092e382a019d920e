"""What is refused before step 0, by training, plan.py and inspect_batch.py in the same words."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from chimera.chatml import IM_END
from chimera.cli import UserError
from chimera.commands import inspect_batch, plan
from chimera.commands.train import main as train
from chimera.config import validated
from chimera.convert.settings import BuildSettings
from chimera.manifest import Stream
from chimera.train.data.external_shards import turn_end
from chimera.train.data.shards import Shards, ShardsTokenizer
from chimera.train.order.schedule import Phase, Stage, build_plan
from chimera.train.step.base import check_pretrained
from chimera.train.step.refusals import check_ends, check_positions, check_untrained
from tests.convert.small_tokenizer import spec
from tests.train.exports import with_special

Overrides = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.max_position_embeddings=64"],
            "sequences of 128 tokens (phase knowledge, from step 16) are longer than the model's 64 positions",
        ),
        (["model.hiden_size=32"], "setting `model.hiden_size` is unknown to transformers' llama configuration"),
        (["model.vocab_size=9"], "setting `model.vocab_size` is 9, but the shards' tokenizer makes ids up to"),
        (["scheduler.warmup_steps=99"], "setting `scheduler`: warmup_steps 99 and decay_steps 10 do not fit"),
        (["max_duration=10ep"], "setting `max_duration` is '10ep'"),
        (["parallelism={tp: 2}"], "setting `parallelism` has tp; it takes `fsdp: {...}` alone"),
        (["tokenizer=."], "setting `tokenizer`: no tokenizer.json at ."),
    ],
)
def test_three_commands_refuse_in_the_same_words(
    overrides: Overrides, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = overrides("run", *words)
    assert plan.main([*config, "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 30
    said = next(line for line in err.splitlines() if message in line)
    for command, more in ((train, []), (inspect_batch.main, ["step=0"])):
        with pytest.raises(UserError) as refused:
            command([*config, *more])
        assert said == f"warning: training would refuse this: {refused.value}"


def test_what_training_takes_is_planned_without_a_word(
    overrides: Overrides, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*overrides("run", "mix_by=tokens"), "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_longer_sequences_are_trained_on_if_a_setting_says_so() -> None:
    one = build_plan([Phase("p", 4, {"a": 1}, 4)], [Stage(0, 8), Stage(2, 16)], "sequences", 16)  # type: ignore[dict-item]
    check_positions(16, one, beyond=False)
    check_positions(None, one, beyond=False)
    check_positions(8, one, beyond=True)
    with pytest.raises(UserError, match=r"sequences of 16 tokens \(phase p, from step 2\) .* 8 positions"):
        check_positions(8, one, beyond=False)


@pytest.mark.parametrize(
    ("eos", "pad", "message"),
    [
        (("<e>", 0), ("<p>", 1), None),
        (("<e>", 0), ("<e>", 0), "have <e> for padding and for the end of a document"),
        (("<e>", 0), (IM_END, 3), r"`chat`: <\|im_end\|> is a mark of its turns .* would be trained: build"),
        ((IM_END, 3), ("<p>", 1), r"`chat`: <\|im_end\|> is a mark .* told from the end of a document: build"),
    ],
)
def test_padding_ends_of_documents_and_of_turns_are_told_apart(
    eos: tuple[str, int], pad: tuple[str, int], message: str | None
) -> None:
    tokenizer = ShardsTokenizer(Path("none"), "", 9, eos[1], pad[1], eos[0], pad[0])
    texts = Stream.from_index("", 1, 8, 16, "a test")
    streams = {"chat": texts.model_copy(update={"format": "chatml"}), "text": texts}
    shards = Shards("/shards", "", tokenizer, 16, streams)
    chat, text = (build_plan([Phase("p", 4, {n: 1}, 4)], [Stage(0, 16)], "sequences", 16) for n in ("chat", "text"))  # type: ignore[dict-item]
    if message is None:
        check_ends(shards, chat)
        return
    with pytest.raises(UserError, match=message):
        check_ends(shards, chat)
    if pad[1] != eos[1]:
        check_ends(shards, text)  # whose texts hold no such mark


def test_turns_marked_as_not_to_be_learned_are_not_trained_with_all_else() -> None:
    texts = Stream.from_index("", 1, 8, 16, "a test")
    chat = texts.model_copy(update={"format": "chatml", "turns": {"untrained": 3}})
    shards = Shards("/shards", "", ShardsTokenizer(Path("none"), "", 9, 0, 1, "<e>", "<p>"), 16, {"chat": chat})
    plan = build_plan([Phase("p", 4, {"chat": Fraction(1)}, 4)], [Stage(0, 16)], "sequences", 16)
    check_untrained("assistant", shards, plan)
    with pytest.raises(UserError, match="`chat`: 3 turns of the assistant are marked as not to be learned"):
        check_untrained("all", shards, plan)


def test_a_pad_token_that_marks_turns_is_refused_before_a_build() -> None:
    stream = {"format": "chatml", "sources": [{"files": ["a.jsonl"]}]}
    values = {"output": "out", "tokenizer": {"path": "t", "pad_token": IM_END}, "streams": {"chat": stream}}
    with pytest.raises(UserError, match=r"`tokenizer.pad_token`: <\|im_end\|> marks the turns of streams.chat"):
        validated(BuildSettings, values, "shards.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"post_processor": None, "decoder": None}, None),
        ({"normalizer": {"type": "NFC"}}, "their `normalizer` differs"),
        ({"pre_tokenizer": None}, "their `pre_tokenizer` differs"),
        ("merges", "their merges differ"),
        ("rstrip", r"the added token '<\|im_end\|>' is matched otherwise there"),
        ("grown", None),
        ("shrunk", r"1 of its \d+ tokens have another id or none there, '<new>' for one"),
    ],
)
def test_another_tokenizer_than_the_model_folders_is_refused(
    tmp_path: Path, change: object, message: str | None
) -> None:
    theirs, ours = json.loads(spec()), json.loads(spec())
    if isinstance(change, dict):
        ours |= change
    elif change == "merges":
        ours["model"]["merges"] = ours["model"]["merges"][::-1]
    elif change == "rstrip":
        ours["added_tokens"][3]["rstrip"] = True
    elif change == "grown":
        ours = with_special("<new>")
    else:
        theirs = with_special("<new>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    if message is None:
        check_pretrained(str(tmp_path), tmp_path / "ours.json")
        return
    with pytest.raises(UserError, match=message):
        check_pretrained(str(tmp_path), tmp_path / "ours.json")


def test_an_eos_that_ends_turns_is_seen_in_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(spec())
    turns = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    for eos, expected in ((IM_END, IM_END), ("<|endoftext|>", None)):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": turns}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert turn_end(tmp_path) == expected
