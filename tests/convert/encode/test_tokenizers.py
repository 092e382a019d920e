"""Tokenizers of other families: a BOS, no padding token, one special token for all, truncation in the file."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from chimera.cli import UserError
from chimera.commands import verify_shards
from chimera.convert.build.executor import Event
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.equivalence import SPLITS, byte_characters
from chimera.convert.encode.texts import chunks
from chimera.convert.settings import TokenizerSettings
from chimera.convert.verify.block_rules import BlockRules
from chimera.tokenizer_file import before_text, load, put_before_text, with_tokens
from chimera.train.data.shards import open_shards
from tests.convert import builds
from tests.convert.s3_server import S3Server
from tests.convert.small_tokenizer import END, EOS, PAD, START, spec

BOS = "<|begin|>"
TEXTS = [f"{i} " + builds.texts(i, 1)[0] for i in range(40)]


def template(*tokens: tuple[str, int]) -> dict[str, Any]:
    """A post-processor that puts tokens before a text, as Llama 3's does."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in tokens]
    special = {token: {"id": token, "ids": [id_], "tokens": [token]} for token, id_ in tokens}
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": first + text, "pair": pair, "special_tokens": special}


def plain() -> dict[str, Any]:
    return dict(json.loads(spec()))


def with_bos() -> dict[str, Any]:
    found = json.loads(with_tokens(spec().encode(), [BOS]))
    return {**found, "post_processor": template((BOS, found["added_tokens"][-1]["id"]))}


def single() -> dict[str, Any]:
    """GPT-2's kind: one special token for everything."""
    return {**plain(), "added_tokens": plain()["added_tokens"][:1]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(json_spec: dict[str, Any], **config: str) -> str:
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(json_spec))
        (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
        return str(tmp_path / "tokenizer")

    return write


def settings(folder: Path, tokenizer: dict[str, Any], out: str = "out", **stream: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_bytes(builds.jsonl({"text": text} for text in TEXTS))
    streams = {"web": {"sources": [{"files": [f"{folder}/rows.jsonl"]}], "min_chars": 0, **stream}}
    return builds.config(folder, folder / out, tokenizer=tokenizer, streams=streams, compression=None, part_bytes=3000)


def blocks(output: Path, stream: str = "web") -> np.ndarray:
    """All train blocks, [blocks, 64]."""
    found = []
    for entry in json.loads((output / stream / "train/index.json").read_bytes())["shards"]:
        data = (output / stream / "train" / entry["raw_data"]["basename"]).read_bytes()
        records = np.frombuffer(data, np.uint8, offset=int(np.frombuffer(data, "<u4", 2)[1]))
        found.append(records.reshape(entry["samples"], -1)[:, -128:].copy().view("<u2"))
    return np.concatenate(found)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_each_text_begins_with_what_its_tokenizer_puts_there(
    tmp_path: Path, write: Callable[..., str], packing: str
) -> None:
    path = write(with_bos())
    manifest = builds.build_here({**settings(tmp_path, {"path": path}, packing=packing), "eval_fraction": 0})
    loaded = load(json.dumps(with_bos()))
    bos, eos, pad = (loaded.token_to_id(token) for token in (BOS, EOS, PAD))
    loaded.encode_special_tokens = True
    wanted = [[*loaded.encode(text).ids, eos] for text in TEXTS]
    assert all(ids[0] == bos for ids in wanted)
    long = [ids for ids in wanted if len(ids) - 2 >= 10]  # min_tokens, without BOS and EOS
    kept = [id_ for ids in long for id_ in ids]
    tokens = blocks(tmp_path / "out")
    if packing == "concat":
        assert tokens[tokens != pad].tolist() == kept
    assert sorted(tokens[tokens != pad].tolist()) == sorted(kept)
    assert manifest["tokenizer"]["bos"] == [bos]
    assert manifest["streams"]["web"]["train"]["tokens"] == len(kept)
    assert verify_shards.main([str(tmp_path / "out")]) == 0


def test_a_conversation_gets_no_bos_but_its_templates(tmp_path: Path, write: Callable[..., str]) -> None:
    encoder = Encoder.from_settings(TokenizerSettings(path=write(with_bos())))
    config = settings(tmp_path, {"path": write(with_bos())}, packing="best_fit", format="chatml", min_chars=50)
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl(builds.chats(1, 20)))
    manifest = builds.build_here(config)
    assert encoder.bos
    assert not np.isin(encoder.bos, blocks(tmp_path / "out")[:, 8:]).any()
    assert "bos" not in manifest["tokenizer"]
    assert verify_shards.main([str(tmp_path / "out")]) == 0


def test_builds_without_bos_are_as_they_were_before_there_was_a_choice(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    path = write(plain())
    usual = builds.build_here(settings(tmp_path, {"path": path}))
    assert usual["settings"]["tokenizer"] == {"eos_token": EOS, "pad_token": PAD}
    assert usual["tokenizer"].keys() == {"digest", "vocab_size", "eos_token", "eos_id", "pad_token", "pad_id"}
    before = builds.tree(tmp_path / "out")
    builds.build_here(settings(tmp_path, {"path": path, "bos": "never"}))  # finished: the same build
    builds.build_here(settings(tmp_path, {"path": path, "bos": "never"}, "other"))
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "other") == before


class Stopped(builds.Inline):
    def wait(self, seconds: float) -> list[Event]:
        super().wait(seconds)
        raise KeyboardInterrupt


def test_an_older_build_is_never_mixed_with_one_that_puts_bos(tmp_path: Path, write: Callable[..., str]) -> None:
    """What builds of before made is what `bos: never` makes."""
    path = write(with_bos())
    older, now = (settings(tmp_path, {"path": path, "bos": bos}) for bos in ("never", "auto"))
    with pytest.raises(KeyboardInterrupt):
        builds.build_here(older, Stopped)
    refused = r"other settings \(what texts begin with: ids \[\], as `tokenizer.bos: never` has it -> \[\d+\]"
    with pytest.raises(UserError, match=f"unfinished build in .*{refused}"):
        builds.build_here(now)
    manifest = builds.build_here(older)
    before = builds.tree(tmp_path / "out")
    with pytest.raises(UserError, match=refused):
        builds.build_here(now)
    assert builds.tree(tmp_path / "out") == before
    again = builds.build_here({**now, "rebuild": True})
    more = again["streams"]["web"]["train"]["documents"]
    assert again["streams"]["web"]["train"]["tokens"] - manifest["streams"]["web"]["train"]["tokens"] == more


def test_bos_always_takes_the_token_that_the_folder_names(write: Callable[..., str]) -> None:
    def bos(**words: str) -> tuple[int, ...]:
        return Encoder.from_settings(TokenizerSettings(path=str(path), bos=words.get("bos", "always"))).bos

    path = write(with_bos() | {"post_processor": None}, bos_token=BOS)
    assert bos() == (load(json.dumps(with_bos())).token_to_id(BOS),)
    assert bos(bos="auto") == ()
    for config, message in (
        ({}, "no tokenizer_config.json beside it names a bos_token"),
        ({"bos_token": "<s>"}, "'<s>'"),
    ):
        path = write(plain(), **config)
        with pytest.raises(UserError, match=f"`tokenizer.bos: always`: .* puts nothing before a text, and .*{message}"):
            bos()


def test_a_bos_that_is_the_end_of_documents_is_refused(write: Callable[..., str]) -> None:
    path = write({**single(), "post_processor": template((EOS, 0))})
    with pytest.raises(UserError, match=r"puts '<\|endoftext\|>' before a text, which ends documents .*bos: never"):
        Encoder.from_settings(TokenizerSettings(path=path, pad_token=None))
    assert Encoder.from_settings(TokenizerSettings(path=path, pad_token=None, bos="never")).bos == ()
    path = write(single(), bos_token=EOS)
    with pytest.raises(
        UserError, match=r"the bos_token of the tokenizer_config.json beside .*tokenizer.json puts '<.end"
    ):
        Encoder.from_settings(TokenizerSettings(path=path, pad_token=None, bos="always"))


def test_the_verifier_finds_a_text_without_bos_and_bos_within_one() -> None:
    rules = BlockRules(100, eos_id=0, pad_id=1, special=frozenset({0, 1, 2}), bos=(2,))
    sound = [[2, 9, 9, 0, 2, 9, 0, 1], [9, 9, 0, 2, 9, 9, 9, 9], [9, 0, 2, 9, 9, 9, 9, 0]]
    assert not list(rules.broken(np.array(sound), None))
    for bad in ([2, 9, 9, 0, 9, 9, 0, 1], [9, 9, 2, 9, 9, 9, 9, 9]):
        assert list(rules.broken(np.array([sound[0], bad]), None)) == [
            "block 1 has a text that does not begin with BOS, and it alone"
        ]


def test_concat_needs_no_padding_token(tmp_path: Path, write: Callable[..., str]) -> None:
    """The rest of a part's last block is filled with EOS, which no loss is computed for and which counts as padding."""
    path = write(single())
    found = builds.build_here(settings(tmp_path, {"path": path, "pad_token": None}))
    write(with_tokens_of(single(), PAD))
    other = builds.build_here(settings(tmp_path, {"path": path}, "padded"))
    counts, theirs = found["streams"]["web"]["train"], other["streams"]["web"]["train"]
    assert {**counts, "index": ""} == {**theirs, "index": ""}
    assert counts["padding"] > 0
    pad = other["tokenizer"]["pad_id"]
    padded = blocks(tmp_path / "padded")
    assert blocks(tmp_path / "out").tolist() == np.where(padded == pad, 0, padded).tolist()
    assert (found["tokenizer"]["pad_token"], found["tokenizer"]["pad_id"]) == (None, None)
    assert verify_shards.main([str(tmp_path / "out")]) == 0


def with_tokens_of(json_spec: dict[str, Any], *tokens: str) -> dict[str, Any]:
    return dict(json.loads(with_tokens(json.dumps(json_spec).encode(), tokens)))


@pytest.mark.parametrize("stream", [{"packing": "best_fit"}, {"packing": "none"}, {"min_tokens": 0}])
def test_without_a_padding_token_nothing_may_need_one(tmp_path: Path, stream: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"`tokenizer.pad_token`: null is for .* streams.web is not: .*add: <\|pad\|>"):
        builds.merged(settings(tmp_path, {"path": "x", "pad_token": None}, **stream))


def test_filling_is_told_from_the_end_that_it_follows() -> None:
    rules = BlockRules(100, eos_id=0, pad_id=None, special=frozenset({0}))
    tokens = np.array([[9, 9, 0, 9, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9, 0]])
    assert rules.padding(tokens).sum(axis=1).tolist() == [2, 6, 0]
    assert not list(rules.broken(tokens, None))
    assert list(rules.broken(np.array([[9, 0, 0, 9, 9, 9, 0]]), None)) == ["block 0 has padding before a token"]


def test_tokens_are_added_where_a_tokenizer_lacks_them(tmp_path: Path, write: Callable[..., str]) -> None:
    """GPT-2's kind for conversations: `pad_token: {add: ...}` and ChatML's two."""
    tokenizer = {"path": write(single()), "pad_token": {"add": "<|pad|>"}, "add_tokens": [START, END]}
    config = settings(tmp_path, tokenizer, packing="best_fit", format="chatml", min_chars=50)
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl(builds.chats(1, 20)))
    manifest = builds.build_here(config)
    size = len(load(json.dumps(single())).get_vocab())
    stored = load((tmp_path / "out/tokenizer/tokenizer.json").read_bytes())
    # PAD was an added token that is a plain entry of the vocabulary now, as ChatML's are: they keep their ids
    assert [stored.token_to_id(token) for token in (EOS, START, END, "<|pad|>")] == [0, 2, 3, size]
    assert manifest["tokenizer"]["pad_id"] == size
    assert manifest["settings"]["tokenizer"] == {"eos_token": EOS, "pad_token": "<|pad|>"}
    assert verify_shards.main([str(tmp_path / "out")]) == 0
    before = builds.tree(tmp_path / "out")
    stored_file = tmp_path / "out/tokenizer/tokenizer.json"  # which has them: nothing is added
    Path(tokenizer["path"], "tokenizer.json").write_bytes(stored_file.read_bytes())
    builds.build_here(config)
    assert builds.tree(tmp_path / "out") == before


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind s3://bucket."""
    with S3Server(tmp_path / "s3") as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        yield tmp_path / "s3/bucket"


def test_a_tokenizer_in_a_store_is_that_of_the_folder(tmp_path: Path, write: Callable[..., str], s3: Path) -> None:
    path = write(with_bos() | {"post_processor": None}, bos_token=BOS)
    shutil.copytree(path, s3 / "their/tokenizer")
    builds.build_here(settings(tmp_path, {"path": path, "bos": "always"}, "local"))
    for name, place in (
        ("folder", "s3://bucket/their/tokenizer"),
        ("file", "s3://bucket/their/tokenizer/tokenizer.json"),
    ):
        builds.build_here(settings(tmp_path, {"path": place, "bos": "always"}, name))
        assert builds.tree(tmp_path / name) == builds.tree(tmp_path / "local")
    with pytest.raises(UserError, match=r"no tokenizer at s3://bucket/their: give a folder"):
        builds.build_here(settings(tmp_path, {"path": "s3://bucket/their"}, "none"))
    open_shards(str(tmp_path / "local"), "").check_tokenizer("s3://bucket/their/tokenizer")


def test_a_sentencepiece_model_has_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 20))
    about = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        **about, input=f"{tmp_path}/texts.txt", model_prefix=f"{tmp_path}/tokenizer", vocab_size=400,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = Encoder.from_settings(TokenizerSettings(path=str(tmp_path), eos_token="</s>", pad_token=None))
    ours = spm.SentencePieceProcessor(model_file=f"{tmp_path}/tokenizer.model")
    for text in ("il  gatto\nè 😀 <s>", "the of"):
        ((ids, _),) = encoder.encode([Document((text.encode(),))])
        assert ids.tolist() == [1, *ours.encode(text), 2]


def test_a_sentencepiece_model_that_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e\x00")
    with pytest.raises(
        UserError, match=r"tokenizer.path: .*tokenizer.model: (converting it needs|transformers does not)"
    ):
        Encoder.from_settings(TokenizerSettings(path=str(tmp_path)))


def ranks() -> dict[bytes, int]:
    """The small tokenizer's entries as tiktoken ranks: single bytes first, then what each merge makes."""
    byte = {character: byte for byte, character in byte_characters().items()}
    merged = ["".join(pair) for pair in plain()["model"]["merges"]]
    return {bytes(byte[c] for c in entry): rank for rank, entry in enumerate([*byte, *merged])}


def write_tekken(folder: Path, **changes: Any) -> None:
    """A `tekken.json` of 10 special tokens, 4 of them without a name, and padded by an entry that is left out."""
    words = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(b).decode()} for b, i in ranks().items()]
    config = {"pattern": SPLITS["Tekken"], "default_vocab_size": 10 + len(vocab), "default_num_special_tokens": 10}
    special = [{"rank": i, "token_str": word, "is_control": True} for i, word in enumerate(words)]
    unused = {"rank": len(vocab), "token_bytes": base64.b64encode(b"\x00unused").decode()}
    about = {"config": config, "vocab": [*vocab, unused], "special_tokens": special, **changes}
    (folder / "tekken.json").write_text(json.dumps(about))


UNICODE = [*TEXTS, "e\u0301 ǅ 👩\u200d👧 ①½", "\u00a0\u3000漢字かな", "مرحبا\r\n\r\n  \t12345", "WE'VE they'll DON'T"]
UNICODE += ["  ".join(UNICODE), "\n\n ".join(UNICODE), "".join(map(chr, range(1, 0x3000)))]


def test_tekken_has_the_ids_of_tiktoken_after_the_special_tokens(tmp_path: Path) -> None:
    write_tekken(tmp_path)
    theirs = tiktoken.Encoding("tekken", pat_str=SPLITS["Tekken"], mergeable_ranks=ranks(), special_tokens={})
    encoder = Encoder.from_settings(TokenizerSettings(path=str(tmp_path), eos_token="</s>", pad_token="<pad>"))
    assert encoder.path == "fastokens"
    wanted = [[1, *(10 + rank for rank in theirs.encode_ordinary(text)), 2] for text in UNICODE]
    for _ in range(2):
        found = encoder.encode([Document(tuple(chunks(text.encode()))) for text in UNICODE])
        assert [ids.tolist() for ids, _ in found] == wanted
        encoder.leave_fast_path("for the test")
    assert encoder.special_ids["<SPECIAL_9>"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special_tokens": None}, "does not hold its special tokens"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}]}, "two of its tokens are the same"),
        ({"config": {"pattern": r"\p{N}+|.+"}}, "it gives a text other ids"),
    ],
)
def test_a_tekken_that_cannot_be_converted_is_one_line(tmp_path: Path, changes: Any, message: str) -> None:
    write_tekken(tmp_path, **changes)
    with pytest.raises(
        UserError, match=rf"tokenizer.path: .*tekken.json: .*{message}.*: give the model's tokenizer.js"
    ):
        Encoder.from_settings(TokenizerSettings(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.model"])
def test_bare_ranks_are_refused_with_what_makes_a_tokenizer_of_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (b"%s %d\n" % (base64.b64encode(entry), rank) for entry, rank in ranks().items())
    (tmp_path / name).write_bytes(b"".join(lines))
    path = TokenizerSettings(path=str(tmp_path), pad_token=None)
    with pytest.raises(UserError, match=f"{name}: these are tiktoken's ranks") as refusal:
        Encoder.from_settings(path)
    from transformers.convert_slow_tokenizer import TikTokenConverter

    monkeypatch.chdir(tmp_path)
    about = {"FILE": name, "REGEX": SPLITS["Llama 3"], "SPECIAL_TOKENS": [EOS], "TikTokenConverter": TikTokenConverter}
    eval(re.search("`(TikToken.*)`", str(refusal.value))[1], about)
    theirs = tiktoken.Encoding("own", pat_str=SPLITS["Llama 3"], mergeable_ranks=ranks(), special_tokens={})
    found = Encoder.from_settings(path).encode([Document(tuple(chunks(text.encode()))) for text in UNICODE])
    assert [ids.tolist()[:-1] for ids, _ in found] == list(map(theirs.encode_ordinary, UNICODE))


def test_a_files_own_truncation_and_padding_are_off() -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
    model = {**plain()["model"], "dropout": 0.9}
    changed = {**plain(), "truncation": cut, "padding": {**pad, "pad_token": PAD}, "model": model}
    for text in ("a", "Il gatto dorme sotto l'albero."):
        assert load(json.dumps(changed)).encode(text).ids == load(spec()).encode(text).ids


@pytest.mark.parametrize("ids", [[], [2], [2, 3]])
def test_an_export_puts_before_a_text_what_the_shards_have(ids: list[int]) -> None:
    for own in (plain(), with_bos(), {**plain(), "post_processor": template((EOS, 0), (START, 2))}):
        loaded = load(json.dumps(own))
        text = loaded.encode("Il gatto", add_special_tokens=False).ids
        put_before_text(loaded, ids)
        assert before_text(loaded) == ids
        assert loaded.encode("Il gatto").ids == [*ids, *text]
        assert loaded.decode(loaded.encode("Il gatto").ids) == "Il gatto"


def test_tokenizers_are_loaded_in_one_place() -> None:
    """Or one of them would cut or pad as its file says."""
    for path in (builds.ROOT / "chimera").rglob("*.py"):
        if path.name not in ("tokenizer_file.py", "equivalence.py"):  # which makes one of a bare model
            assert "Tokenizer.from_" not in path.read_text(encoding="utf-8").replace("AutoTokenizer.", ""), path
