"""Token shards made by others with streaming's own MDSWriter, as llm-foundry's conversion leaves them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from chimera.cli import UserError
from chimera.train.data.external_shards import open_external, read_tokenizer
from chimera.train.data.mixture import MixtureDataset
from chimera.train.data.roots import open_root
from chimera.train.settings import TrainSettings, read_settings
from chimera.train.step.collate import IGNORED, LabelRules, StepInfo, view_sequences
from tests.train.make_shards import plan_for

LENGTH = 16
PLAN = plan_for([(3, {"web": 1})], {0: 4}, batch=16)  # four blocks a step


def tokens(block: int) -> np.ndarray:
    return np.arange(LENGTH) + 1000 * block


def write(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any) -> None:
    with MDSWriter(out=str(folder), columns=columns, size_limit=2000, **options) as out:
        for sample in samples:
            out.write(sample)


def read(root: Path, tmp_path: Path) -> dict[int, list[int]]:
    """All blocks as a run over the stream sees them."""
    data = MixtureDataset(root=str(root), cache=str(tmp_path / "cache"), plan=PLAN, seed=1)
    found: dict[int, list[int]] = {}
    for record in data:
        found.update(zip(record["block"].tolist(), record["tokens"].tolist(), strict=True))
    return found


EXPECTED = {block: tokens(block).tolist() for block in range(12)}


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd:1"}, {"compression": "gz", "hashes": ["sha1", "xxh64"]}])
@pytest.mark.parametrize(
    ("encoding", "store"),
    [
        ("bytes", lambda block: tokens(block).astype(np.int64).tobytes()),
        ("ndarray:int32", lambda block: tokens(block).astype(np.int32)),
        ("ndarray:uint16:16", lambda block: tokens(block).astype(np.uint16)),
    ],
)
def test_blocks_of_one_length_are_read_whatever_their_encoding(
    tmp_path: Path, split: str, options: dict[str, Any], encoding: str, store: Any
) -> None:
    write(tmp_path / "web" / split, {"tokens": encoding}, [{"tokens": store(b)} for b in range(12)], **options)
    assert read(tmp_path, tmp_path) == EXPECTED


def test_columns_beside_the_tokens_are_passed_over(tmp_path: Path) -> None:
    samples = [{"tokens": tokens(b).astype(np.int32), "id": b, "source": "abcd", "z": b"xy"} for b in range(12)]
    write(tmp_path / "web", {"tokens": "ndarray:int32", "id": "int", "source": "str", "z": "bytes"}, samples)
    assert read(tmp_path, tmp_path) == EXPECTED


@pytest.mark.parametrize("encoding", ["ndarray:uint8", f"ndarray:uint8:{LENGTH // 8}"])
def test_masks_are_read_from_their_column(tmp_path: Path, encoding: str) -> None:
    learned = {block: np.arange(LENGTH) > block for block in range(12)}
    packed = {block: np.packbits(mask, bitorder="little") for block, mask in learned.items()}
    samples = [{"tokens": tokens(block).astype(np.int32), "assistant": packed[block]} for block in range(12)]
    write(tmp_path / "web", {"tokens": "ndarray:int32", "assistant": encoding}, samples)
    data = MixtureDataset(root=str(tmp_path), cache=str(tmp_path / "cache"), plan=PLAN, seed=1)
    found = {b: mask for record in data for b, mask in zip(record["block"], record["assistant"], strict=True)}
    assert all(found[block].tolist() == mask.tolist() for block, mask in learned.items())


def refused(tmp_path: Path, columns: dict[str, str], samples: list[dict[str, Any]], message: str) -> None:
    write(tmp_path / "web", columns, samples)
    with pytest.raises(UserError, match=message):
        read(tmp_path, tmp_path)


def test_records_of_different_lengths_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": tokens(b)[: LENGTH - b % 2].tobytes()} for b in range(12)]
    refused(tmp_path, {"tokens": "bytes"}, samples, r"shard \S+/web/shard.00000.mds: its records differ in length")


def test_records_that_differ_in_shape_but_not_in_length_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": bytes(8 * (4 + b % 2)), "id": bytes(8 * (4 - b % 2))} for b in range(12)]
    refused(tmp_path, {"tokens": "bytes", "id": "bytes"}, samples, "its records differ in shape")


def test_blocks_of_another_length_than_the_plans_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": np.zeros(24, np.int64).tobytes()} for _ in range(12)]
    refused(tmp_path, {"tokens": "bytes"}, samples, "holds blocks of 24 tokens, 16 are expected")


@pytest.mark.parametrize(
    ("columns", "sample", "message"),
    [
        ({"text": "str"}, {"text": "abc"}, r"has no column `tokens` \(it has text\)"),
        ({"tokens": "str"}, {"tokens": "abc"}, "column `tokens` is stored as `str`; readable are"),
        ({"tokens": "pkl"}, {"tokens": [1, 2]}, "column `tokens` is stored as `pkl`; readable are"),
    ],
)
def test_what_holds_no_tokens_is_refused(
    tmp_path: Path, columns: dict[str, str], sample: dict[str, Any], message: str
) -> None:
    refused(tmp_path, columns, [sample] * 12, message)


def test_shards_of_ours_without_their_manifest_are_not_taken_for_such(demo_shards: Path, tmp_path: Path) -> None:
    """A build that is not finished, or a copy of one: nothing would say which token is padding."""
    shutil.copytree(demo_shards, tmp_path / "shards")
    shutil.copytree(demo_shards.parent / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "shards/manifest.json").unlink()
    with pytest.raises(UserError, match=r"their manifest\.json is missing: .* finish the build"):
        open_external(f"{tmp_path}/shards", f"{tmp_path}/cache", f"{tmp_path}/tokenizer", ["it_culturax"])


def test_a_run_trains_on_them_with_the_tokenizer_the_config_names(demo_shards: Path, tmp_path: Path) -> None:
    """As someone does who comes from llm-foundry: MDS folders, a tokenizer folder, no manifest."""
    from chimera.commands.train import main
    from tests.train.conftest import ROOT, SMALL, steps_of

    for name in ("one", "two"):
        samples = [{"tokens": np.random.default_rng(b).integers(4, 3000, 128).astype(np.int32)} for b in range(20)]
        for sample in samples:
            sample["tokens"][40] = 0  # EOS
        write(tmp_path / "old" / name, {"tokens": "ndarray:int32"}, samples)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes((demo_shards / "tokenizer/tokenizer.json").read_bytes())
    config = [
        *(str(ROOT / "yamls/demo/base.yaml"), *SMALL),
        f"shards=[{tmp_path}/old, {demo_shards}]",  # and one of ours beside them
        f"cache={tmp_path}/cache",
        f"save_folder={tmp_path}/run",
        "phases=[{name: all, steps: 6, proportions: {one: 0.5, two: 0.25, it_culturax: 0.25}}]",
        "scheduler.decay_steps=2",
    ]
    with pytest.raises(UserError, match="no shards at"):
        main(config)
    config.append(f"tokenizer={tmp_path}/tokenizer")
    with pytest.raises(UserError, match="names no eos_token"):
        main(config)
    (tmp_path / "tokenizer/special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert main(config) == 0
    assert [line["streams"] for line in steps_of(tmp_path / "run")][:2] == [
        {"one": 256, "two": 128, "it_culturax": 128}
    ] * 2


BOS_ID, EOS_ID, OPEN_ID = 510, 511, 512  # of a folder of Llama 3's kind: <|eot_id|> is its EOS
SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>")


def folder_of(tmp_path: Path, **config: str) -> str:
    from chimera.tokenizer_file import with_tokens
    from tests.convert.small_tokenizer import spec

    (tmp_path / "tokenizer").mkdir()
    raw = with_tokens(spec().encode(), SPECIAL)
    ids = [token["id"] for token in json.loads(raw)["added_tokens"]][-3:]
    assert ids == [BOS_ID, EOS_ID, OPEN_ID]
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(raw)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>", **config}))
    return f"{tmp_path}/tokenizer"


TURNS = [OPEN_ID, 9, 9, EOS_ID, OPEN_ID, 8, 8, 8, EOS_ID]
WITH_BOS = {"bos_token": "<|begin_of_text|>"}


@pytest.mark.parametrize(
    ("document", "config", "doubt"),
    [
        ([9, 9, 9], {}, r"none of its first 12 blocks holds '<\|eot_id\|>', the tokenizer's EOS"),
        (
            [BOS_ID, *TURNS],
            WITH_BOS,
            r"to end every turn .* \(\d+ of \d+ are not followed by BOS\)",
        ),
        (TURNS, {}, r"to end every turn .* \(\d+ of \d+ are followed by '<\|start_header_id\|>'\)"),
        ([OPEN_ID, 9, EOS_ID, 6], {}, r"are followed by '<\|start_header_id\|>'\)"),  # a line end between turns
        ([9, 8, 7, EOS_ID], {}, None),
        ([BOS_ID, 9, 8, 7, EOS_ID], WITH_BOS, None),
        ([OPEN_ID, 9, 9, OPEN_ID, 8, 8, EOS_ID], {}, None),  # the end of a conversation of two turns
        ([OPEN_ID, 9, 9, OPEN_ID, 8, 8, EOS_ID], WITH_BOS, None),
    ],
)
def test_an_end_of_documents_that_is_none_is_one_line(
    tmp_path: Path, document: list[int], config: dict[str, str], doubt: str | None
) -> None:
    stream = np.resize(document, 12 * LENGTH).astype(np.uint16).reshape(12, LENGTH)
    write(tmp_path / "old/web", {"tokens": "ndarray:uint16"}, [{"tokens": block} for block in stream])
    place = (f"{tmp_path}/old", f"{tmp_path}/cache", folder_of(tmp_path, **config), ["web"])
    if doubt is not None:
        with pytest.raises(UserError, match=f"stream `web` at .*: .*{doubt}: say how .*`document_ends: eos`"):
            open_external(*place)
        assert open_external(*place, "eos").tokenizer.document_ends == "eos"  # who says so, means it
    else:
        bos = [BOS_ID] if BOS_ID in document else []
        assert list(open_external(*place).tokenizer.bos) == bos


@pytest.mark.parametrize("size", [4, 8])
def test_ids_that_the_tokenizer_has_not_are_one_line(tmp_path: Path, size: int) -> None:
    """Whoever ends documents: bytes of another width than int64 are read as ids beyond any tokenizer's."""
    blocks = np.full((12, LENGTH), EOS_ID, f"int{8 * size}") + (size == 8) * 1000
    write(tmp_path / "old/web", {"tokens": "bytes"}, [{"tokens": block.tobytes()} for block in blocks])
    with pytest.raises(UserError, match=r"stream `web` at .* holds token id \d+, and the ids of .* end at 512"):
        open_external(f"{tmp_path}/old", f"{tmp_path}/cache", folder_of(tmp_path), ["web"], "eos")


@pytest.mark.parametrize(("ends", "starts"), [("eos", [3, 6]), ("bos", [6]), ("none", [])])
def test_documents_are_told_apart_as_the_setting_says(tmp_path: Path, ends: str, starts: list[int]) -> None:
    block = [BOS_ID, 9, EOS_ID, OPEN_ID, 8, EOS_ID, BOS_ID, 7]
    tokenizer = read_tokenizer(Path(folder_of(tmp_path, **WITH_BOS)), ends)
    rules = LabelRules.of(tokenizer, TrainSettings.model_construct(train_on="all", document_mask=True))
    info = StepInfo(0, "p", 8, "d", {}, 0, 1, (False,))
    views = view_sequences({"tokens": torch.tensor([block]), "assistant": None, "info": info}, rules)
    assert np.flatnonzero(views["position_ids"][0] == 0).tolist() == [0, *starts]
    assert np.flatnonzero(views["labels"][0] == IGNORED).tolist() == starts


def test_who_tells_documents_apart_by_bos_must_have_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`document_ends: bos`: .* names no bos_token"):
        read_tokenizer(Path(folder_of(tmp_path, bos_token="<|eot_id|>")), "bos")


def test_shards_of_a_build_say_themselves_where_documents_end(demo_shards: Path) -> None:
    from tests.train.conftest import ROOT

    config = [f"shards={demo_shards}", "document_ends=bos"]
    with pytest.raises(UserError, match="`document_ends` is for token shards made by others"):
        open_root(read_settings(ROOT / "yamls/demo/base.yaml", config))
