"""Several shards roots: their order is that of one root, and what does not go together is refused."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.train.data.mixture import MixtureDataset
from chimera.train.data.places import Places
from chimera.train.data.roots import open_root, plan_with_shards
from chimera.train.settings import TrainSettings
from tests.train.conftest import rewrite
from tests.train.data.test_mixture import PLAN, STREAMS, global_batches
from tests.train.make_shards import make_shards, plan_for


@pytest.fixture
def split(tmp_path: Path) -> dict[str, Any]:
    """One root, and its streams again in three: a local one of ours, a remote one, and one without a manifest."""
    whole = make_shards(tmp_path / "whole", STREAMS, masked=["chat"])
    for name, stream in (("a", "en"), ("b", "it")):
        make_shards(tmp_path / name, {stream: STREAMS[stream]})
    shutil.copytree(whole / "chat", tmp_path / "c" / "chat")
    places = {"en": str(tmp_path / "a"), "it": f"file://{tmp_path}/b", "chat": str(tmp_path / "c")}
    return {"whole": str(whole), "list": list(places.values()), "mapping": places}


@pytest.mark.parametrize("kind", ["list", "mapping"])
def test_the_order_and_the_resumes_of_several_roots_are_those_of_one(
    split: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    expected = global_batches(split["whole"], cache, 1, 0)
    several: Places = split[kind]
    assert global_batches(several, cache, 2, 0) == expected
    one, other = (MixtureDataset(root=root, cache=str(cache), plan=PLAN, seed=17) for root in (split["whole"], several))
    saved = one.state_dict(PLAN.sequences_before(7), True)
    other.load_state_dict(saved)
    assert [(record["step"], record["digest"]) for record in other] == [step[:2] for step in expected[7:]]
    assert other.state_dict(PLAN.sequences_before(7), True) == saved


def test_streams_of_one_name_share_no_cache(tmp_path: Path) -> None:
    first, second = (make_shards(tmp_path / name, {"en": blocks}) for name, blocks in (("a", [9]), ("b", [4, 5])))
    found = [
        MixtureDataset(
            root={"en": str(root)}, cache=str(tmp_path / "cache"), plan=plan_for([(3, {"en": 1})]), seed=1
        ).read_blocks("en", range(9))[0]
        for root in (first, second)
    ]
    assert (found[0] == found[1]).all()
    assert len(list((tmp_path / "cache").glob("en-*/*.mds"))) == 3


def settings_for(tmp_path: Path, shards: Places, **changes: Any) -> TrainSettings:
    mixture = {"name": "p", "steps": 4, "proportions": {"en": 0.5, "it": 0.5}}
    given = {"shards": shards, "cache": str(tmp_path / "cache"), "phases": [mixture]}
    return TrainSettings.model_validate(
        {**given, "curriculum": {"stages": [{"from_step": 0, "seq_len": 16}]}, **changes}
    )


def another_tokenizer(root: Path) -> None:
    file, manifest = root / "tokenizer/tokenizer.json", root / "manifest.json"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"\n")
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    rewrite(manifest, before, after)


def another_pad(root: Path) -> None:
    rewrite(root / "manifest.json", '"pad_token": "', '"pad_token": "<other>')


@pytest.mark.parametrize(
    ("second", "change", "message"),
    [
        ({"it": [9]}, another_tokenizer, r"the tokenizer of the shards at \S+/a is \w+, at \S+/b it is \w+: the roots"),
        ({"it": [9]}, another_pad, r"the pad_token of the shards at \S+/a is .*, at \S+/b it is <other>"),
        ({"it": [9], "en": [9]}, None, r"stream `en` is in two roots of `shards`, \S+/a and \S+/b: give .* a mapping"),
        ({"de": [9]}, None, r"stream `it` is in none of the roots of `shards`, \S+/a and \S+/b: correct"),
        ({"de": [9]}, shutil.rmtree, r"`it` is in none .* and \S+/b \(no shards at \S+/b: no manifest.*\): correct"),
    ],
)
def test_roots_that_do_not_go_together_are_refused(
    tmp_path: Path, second: dict[str, list[int]], change: Callable[[Path], object] | None, message: str
) -> None:
    roots = [make_shards(tmp_path / name, streams) for name, streams in (("a", {"en": [9]}), ("b", second))]
    if change is not None:
        change(roots[1])
    with pytest.raises(UserError, match=message):
        open_root(settings_for(tmp_path, list(map(str, roots))))


def test_blocks_of_another_length_and_a_stream_without_a_root_are_refused(tmp_path: Path) -> None:
    one, other = make_shards(tmp_path / "a", {"en": [9]}), make_shards(tmp_path / "b", {"it": [9]}, block_len=32)
    with pytest.raises(UserError, match=r"the block_len of the shards at \S+/a is 16, at \S+/b it is 32"):
        open_root(settings_for(tmp_path, [str(one), str(other)]))
    with pytest.raises(UserError, match=r"`shards` names no root for stream `it` \(it has en\): add `shards.it`"):
        plan_with_shards(settings_for(tmp_path, {"en": str(one)}))


def test_a_mapping_chooses_among_streams_of_one_name(tmp_path: Path) -> None:
    one, other = (
        make_shards(tmp_path / "a", {"en": [9], "it": [3]}),
        make_shards(tmp_path / "b", {"it": [9], "en": [2]}),
    )
    settings = settings_for(tmp_path, {"en": str(one), "it": str(other)})
    found = open_root(settings)
    assert {name: stream.train.blocks for name, stream in found.streams.items()} == {"en": 9, "it": 9}
    assert found.roots == settings.shards
    _, indexes = plan_with_shards(settings)
    assert indexes is not None
    assert {name: index.blocks for name, index in indexes.items()} == {"en": 9, "it": 9}


def test_a_plan_needs_no_shards_at_any_of_its_roots(tmp_path: Path) -> None:
    assert plan_with_shards(settings_for(tmp_path, [str(tmp_path / "a"), str(tmp_path / "b")]))[1] is None
