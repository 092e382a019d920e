"""plan.py: the table before a run, from the config alone and with shards."""

import json
from pathlib import Path

import pytest
from PIL import Image

from chimera.cli import UserError
from chimera.commands.plan import main
from tests.train.make_shards import make_shards

CONFIG = """
shards: {root}
global_train_batch_size: 16
phases:
  - {{name: knowledge, steps: 30, proportions: {{en: 0.55, it: 0.35, chat: 0.10}}}}
  - {{name: alignment, steps: 10, proportions: {{en: 0.20, it: 0.25, chat: 0.55}}}}
curriculum: {{stages: [{{from_step: 0, seq_len: 4}}, {{from_step: 12, seq_len: 8}}, {{from_step: 24, seq_len: 16}}]}}
tokens_per_second: 100
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "shards"))
    return str(path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", {"en": [100, 60], "it": [90], "chat": [10, 5]})


def test_the_config_alone_tells_what_is_needed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--json"]) == 0
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert "no shards at" in err
    # 12 steps of 4 blocks, 12 of 8, 6 + 10 of 16
    assert (about["steps"], about["tokens"]) == (40, (12 * 4 + 12 * 8 + 16 * 16) * 16)
    chat = {
        "tokens": 112 * 16,
        "positions": 112 * 16,
        "padding": None,
        "blocks": 112,
        "held": None,
        "passes": None,
        "root": None,
    }
    assert about["streams"]["chat"] == chat
    cuts = [
        (s["phase"], s["first_step"], s["last_step"], s["seq_len"], s["blocks_per_step"]) for s in about["segments"]
    ]
    assert cuts == [
        ("knowledge", 0, 11, 4, 4),
        ("knowledge", 12, 23, 8, 8),
        ("knowledge", 24, 29, 16, 16),
        ("alignment", 30, 39, 16, 16),
    ]
    assert about["segments"][3]["streams"] == {"en": 32, "it": 40, "chat": 88}
    for name, stream in about["streams"].items():
        assert stream["blocks"] == sum(segment["streams"][name] for segment in about["segments"])
    assert about["tokens"] == sum(segment["tokens"] for segment in about["segments"])


@pytest.mark.usefixtures("shards")
def test_with_shards_it_tells_passes_and_warns_past_the_limit(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([config, "--json"])
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert {name: stream["passes"] for name, stream in about["streams"].items()} == {
        "en": 164 / 160,
        "it": 124 / 90,
        "chat": 112 / 15,
    }
    assert err.count("warning") == 1
    assert "chat is passed over 7.5 times (max_passes is 4): it holds 15 blocks, 112 are needed" in err
    main([config, "--json", "max_passes=8"])
    assert capsys.readouterr().err == ""
    assert about["smallest_cache_limit"] > 0


@pytest.mark.usefixtures("shards")
def test_the_table_shows_phases_stages_streams_and_time(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([config])
    lines = [line.replace(" %", "%").split() for line in capsys.readouterr().out.splitlines()]
    assert ["knowledge", "12–23", "8", "16", "1.54k", "15", "s", "55.21%", "35.42%", "9.38%"] in lines
    assert ["chat", "1.79k", "112", "15", "7.47"] in lines


def test_the_plot_is_a_picture(config: str, tmp_path: Path) -> None:
    main([config, "--json", "--plot", str(tmp_path / "plan.png")])
    with Image.open(tmp_path / "plan.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases.0.proportions.it=0.25"], "phase knowledge: the proportions sum to 0.9 "),
        (["phases.0.proportions.en=half"], "'half' is not a proportion"),
        (["curriculum.stages.0.seq_len=5"], "5 tokens do not divide blocks of 16; the nearest that do: 4 and 8"),
        (
            ["phases=[{name: p, steps: 3, proportions: {enn: 1}}]"],
            r"`enn` \(in `phases`\) is not in .*, which hold chat, en, it: ",
        ),
        (["curriculum.mode=fast"], "is 'fast'; it must be sequences or tokens"),
        (["--plot", "/nowhere/plan.png"], "--plot /nowhere/plan.png"),
    ],
)
@pytest.mark.usefixtures("shards")
def test_what_cannot_be_planned_is_one_line(config: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([config, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_duration=10ep", "setting `max_duration` is '10ep'; it is given in steps"),
        ("max_duration=9999ba", "setting `max_duration` is 9999ba, but the phases have"),
        ("scheduler.warmup_steps=9999", "setting `scheduler`: warmup_steps 9999 and decay_steps"),
        (
            "eval={interval: 5, seq_lens: [5]}",
            "setting `eval.seq_lens`: sequences of 5 tokens do not divide blocks of 16",
        ),
        ("cache_limit=1gb", "setting `cache_limit` is given, but the shards at"),
    ],
)
@pytest.mark.usefixtures("shards")
def test_what_training_would_refuse_is_said(
    config: str, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([config, "--json", "max_passes=8", override])
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] > 0
    assert f"warning: training would refuse this: {message}" in err


def test_a_batch_that_fills_no_whole_blocks_is_refused_with_the_next(config: str, shards: Path) -> None:
    assert shards.is_dir()
    with pytest.raises(UserError, match=r"6 sequences of 4 tokens do not fill whole blocks of 16; .*: 4 or 8"):
        main([config, "global_train_batch_size=6"])


def test_padding_that_moves_a_share_and_a_stream_that_never_comes_are_warned_of(
    config: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chats' blocks are half padding: 0.1 / 2 of 0.95 in the first phase, 0.55 / 2 of 0.725 in the second."""
    manifest = json.loads((shards / "manifest.json").read_text())
    for name, tokens in {"en": 160 * 16, "it": 90 * 16, "chat": 15 * 8}.items():
        manifest["streams"][name]["train"]["tokens"] = tokens
    manifest.pop("sha256", None)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    main([config, "--json", "max_passes=8"])
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert about["streams"]["chat"]["tokens"] == about["streams"]["chat"]["padding"] == 112 * 8
    assert about["positions"] - about["tokens"] == about["padding"] == 112 * 8
    assert [segment["padding"] for segment in about["segments"]] == [8 * n for n in (5, 9, 10, 88)]
    assert sum(segment["tokens"] for segment in about["segments"]) == about["tokens"]
    assert "warning: phase knowledge: chat is 10.00 % of the positions and 5.26 % of the tokens: 50.00 % of its" in err
    assert "warning: phase alignment: chat is 55.00 % of the positions and 37.93 % of the tokens" in err
    main([config, "phases.1.proportions={en: 0.449, it: 0.55, chat: 0.001}", "max_passes=8"])
    assert "phase alignment: no block of chat comes, its proportion 0.001 of 160 blocks" in capsys.readouterr().err
