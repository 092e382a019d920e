"""What others wrote reaches a terminal, a log or a file only neutralized; secrets reach none of them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError, run
from chimera.commands import build_shards, evaluate, export_hf, plan, report, verify_shards
from chimera.config import load_settings
from chimera.convert.settings import BuildSettings
from chimera.manifest import parse_manifest
from chimera.proof_file import unpack
from chimera.stores import is_remote
from chimera.text import LONGEST, code, json_text, markdown, one_line
from chimera.train.settings import TrainSettings
from tests.convert import builds

# Color, clear, title and answer-back of terminals, other directions, nothing to see, forged lines
HOSTILE = "\x1b[2J\x1b]0;x\x07\x9b31m\x7f\u202egnp\u2066\u200b\ufeff\u2028error: forged\u2029\nerror: forged\r"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff]")
SECRET = "geheim"
SHARDS, TRAIN = "yamls/demo/shards.yaml", "yamls/demo/base.yaml"
ADDRESSES = [
    f"s3://user:sec/{SECRET}@host/b",
    f"s3://user:{SECRET}@host/b",
    f"s3://:{SECRET}@host/b",
    f"S3://user:{SECRET}@host/b",
    f"https://{SECRET}@host/x",
    f"https://{SECRET}%40host/x",
    f"https://user%3A{SECRET}@host/x",
    f"sftp://user:{SECRET}@host/x",
    f"sftp://user:{SECRET}/x@host/x",
    f"hf://user:{SECRET}@datasets/a/b",
    f"oci://user:{SECRET}@namespace/x",
    f"s3:/user:{SECRET}@host/b",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_user_or_token_is_refused_unseen(address: str) -> None:
    with pytest.raises(UserError, match="holds a user, a token or a password") as refused:
        is_remote(address)
    assert SECRET not in str(refused.value)


def refused_unseen(match: str, act: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(UserError, match=f"{match} holds a user, a token or a password") as refused:
        act(*given)
    assert SECRET not in str(refused.value)


def test_it_is_refused_wherever_it_is_given(tmp_path: Path) -> None:
    """In settings of a file, in overrides, also misplaced ones, and as an argument of a command."""
    address, file = ADDRESSES[0], tmp_path / "config.yaml"
    one = "streams.en_cosmopedia.sources.0.files"
    for key in ("output", "work", "tokenizer.path", f"{one}.0", one, "outptu", "hash"):
        refused_unseen(f"setting `{key}`: the address", load_settings, BuildSettings, SHARDS, [f"{key}='{address}'"])
    for key in ("shards", "cache", "tokenizer", "save_folder", "load_path", "model.pretrained", "phases"):
        refused_unseen(f"setting `{key}`: the address", load_settings, TrainSettings, TRAIN, [f"{key}={address}"])
    for key in ("output", "streams"):
        file.write_text(json.dumps({"base": str(Path(SHARDS).absolute()), key: address}))
        refused_unseen(f"setting `{key}`: the address", load_settings, BuildSettings, file)
    checkpoint = f"{address}/ep0-ba1-rank0.pt"
    given: list[tuple[Any, list[str]]] = [
        *((command, [address]) for command in (verify_shards, report, build_shards, plan)),
        *((command, [checkpoint, f"{tmp_path}/out"]) for command in (evaluate, export_hf)),
        *((report, [".", "--out", address]), (export_hf, ["x.pt", address])),
    ]
    for command, words in given:
        refused_unseen("address", command.main, words)


@pytest.mark.parametrize(
    "address",
    [
        "sftp://me@host:22/a@b",
        "oci://bucket@namespace/x",
        "s3://b/a@b:c@d",
        "hf://datasets/a/b@main",
        "http://h:80/a@b",
    ],
)
def test_an_address_without_is_one(address: str) -> None:
    assert is_remote(address)


@pytest.mark.parametrize("address", ["S3://bucket/x", "HF://datasets/a/b", "Sftp://me@host/x", " s3://bucket/x"])
def test_an_address_in_capitals_is_no_folder(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"setting `output` is '.*'; it must be a path, or an address with its scheme in"
    ):
        load_settings(BuildSettings, SHARDS, [f"output='{address}'"])
    for command, words in ((verify_shards, [address]), (export_hf, [f"{address}/x.pt", f"{tmp_path}/out"])):
        with pytest.raises(UserError, match="must begin with its scheme in small letters"):
            command.main(words)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a\\b", "..", "~x", "a\0b", "a\nb", "a\n", "a\u202eb", "\x1b[2J", "x" * 300, "漢" * 90],
    ids=lambda name: ascii(name)[:12],
)
def test_a_run_name_is_no_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Any) -> None:
        load_settings(TrainSettings, TRAIN, [f"run_name={json.dumps(name)}"])

    with pytest.raises(SystemExit, match="2"):
        run(main, [])
    said = capsys.readouterr().err
    assert said.startswith("error: yamls/demo/base.yaml: setting `run_name` is ")
    assert said.count("\n") == 1
    assert not STEERS.search(said)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: " + "[" * 3000 + "]" * 3000,
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{','.join(['*' + b] * 8)}]\n" for b, c in zip("abcdefghi", "bcdefghij", strict=True)),
    ],
    ids=["itself", "itself in a mapping", "depth", "a billion laughs"],
)
def test_yaml_that_has_no_end_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="not readable as YAML"):
        load_settings(BuildSettings, tmp_path / "config.yaml")


def test_a_message_is_one_short_line_and_its_remedy_stays() -> None:
    shown = one_line(f"error: {HOSTILE} {'x' * 10**7}: do this")
    assert not STEERS.search(shown)
    assert "\n" not in shown
    assert len(shown) < LONGEST + 10
    assert shown.endswith("x: do this")
    assert (
        one_line(f"at https://me:{SECRET}@h/x and http://{SECRET}@h, sftp://me@h")
        == "at https://h/x and http://h, sftp://me@h"
    )


def test_text_in_markdown_and_json_stays_text() -> None:
    text = "[a](http://b) <img src=x> `c` | *d* &amp; ![e](f)\n# g"
    assert markdown(text) == r"\[a\](http://b) \<img src=x\> \`c\` \| \*d\* &amp;amp; !\[e\](f) # g"
    assert code("a`b``c") == "``` a`b``c ```"
    value = {HOSTILE: ["è 漢", "\udcff\U000e0041"]}
    assert not STEERS.search(json_text(value))
    assert "è 漢" in json_text(value)
    assert json.loads(json_text(value)) == value


def test_what_data_holds_steers_no_output_of_a_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents, keys, file names, a template's complaint: what is said, shown and written for people."""
    name = "a\x1b[2J\x9b\u202e\u2028b\nerror: forged"
    turns = [{"role": "user", "content": HOSTILE, HOSTILE: 1}, {"role": "assistant", "content": f"{HOSTILE} Sì."}]
    rows = [{"messages": turns, HOSTILE: 1, "x" * 10**5: 2}] * 8
    (tmp_path / f"{name}.jsonl").write_bytes(builds.jsonl(rows))
    texts = [{"text": f"{HOSTILE} {text}"} for text in builds.texts(1, 8)]
    (tmp_path / f"{name}.txt.jsonl").write_bytes(builds.jsonl(texts) + b'{"\x1b[2J": "\xe2\x80\xae"}\n')
    chat = {"format": "chat", "packing": "none", "sources": [{"files": [f"{tmp_path}/a*forged.jsonl"]}]}
    text = {"min_chars": 0, "sources": [{"files": [f"{tmp_path}/a*.txt.jsonl"]}]}
    settings = builds.config(tmp_path, tmp_path / "out", eval_fraction=0, streams={"chats": chat, "texts": text})
    (tmp_path / "shards.yaml").write_text(json.dumps(settings))
    build_shards.main([str(tmp_path / "shards.yaml"), "sample=3"])
    manifest = builds.build_here(settings)
    verify_shards.main([str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "texts/train begins:" in said.err
    written = (tmp_path / "out/manifest.json").read_text()
    assert parse_manifest(written.encode()).model_dump() == manifest
    for shown in (said.out, said.err, written):
        assert not STEERS.search(shown)
        assert not re.search("(?m)^error: forged", said.err)
    assert max(map(len, said.err.splitlines())) < LONGEST + 100


@pytest.mark.parametrize("reach", ["''.__class__.__mro__", "cycler.__init__.__globals__.os"])
def test_a_template_reaches_nothing_of_python(reach: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(f"{{{{ {reach} }}}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}")
    (tmp_path / "chats.jsonl").write_bytes(builds.jsonl(builds.chats(1, 3)))
    chat = {"format": "chat", "template": f"{tmp_path}/t.jinja", "sources": [{"files": [f"{tmp_path}/chats.jsonl"]}]}
    with pytest.raises(UserError, match=r"unsafe|undefined"):
        builds.build_here(builds.config(tmp_path, tmp_path / "out", streams={"chats": chat}))


def test_a_proof_that_claims_a_terabyte_is_refused_before_memory_is_taken() -> None:
    claims = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"  # a frame without a byte
    with pytest.raises(ValueError, match="claims to hold more than"):
        next(unpack(claims))
