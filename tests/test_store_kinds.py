"""Stores of other kinds than S3, spoken to by their real clients: build, build again, verify, read for training."""

import contextlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands import verify_shards
from chimera.objects import Objects
from chimera.train.data import remote
from chimera.train.data.mixture import MixtureDataset
from tests.convert import builds
from tests.convert.hub_server import HubServer
from tests.convert.sftp_server import SftpServer
from tests.train.make_shards import plan_for

SET = "me/shards"


class Loopback:
    """A store at `url`: `files` maps what is below it to bytes."""

    def __init__(self, url: str, stored: dict[str, bytes] | Path, prefix: str = "") -> None:
        self.url, self._stored, self._prefix = url, stored, prefix

    @property
    def files(self) -> dict[str, bytes]:
        if isinstance(self._stored, Path):
            files = (path for path in self._stored.rglob("*") if path.is_file())
            return {str(path.relative_to(self._stored)): path.read_bytes() for path in files}
        return {p.removeprefix(self._prefix): data for p, data in self._stored.items() if p.startswith(self._prefix)}


@contextlib.contextmanager
def hub_with_a_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({SET: {"README.md": b"# Shards"}}) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # as HF_ENDPOINT in a new process
        for module in ("constants", "file_download"):  # the latter up to huggingface_hub 0.36
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub


@pytest.fixture(params=["hf", "hf root", "sftp"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    remote.forget_clients()
    if request.param == "sftp":
        with SftpServer(tmp_path / "sftp") as sftp:
            for key, value in sftp.environment.items():
                monkeypatch.setenv(key, value)
            yield Loopback(f"{sftp.url}/chimera/en it", sftp.root / "chimera" / "en it")
    else:
        below = "" if request.param == "hf root" else "2026/en"
        with hub_with_a_set(monkeypatch) as hub:
            yield Loopback(f"hf://datasets/{SET}/{below}".rstrip("/"), hub.sets[SET], f"{below}/".lstrip("/"))
    remote.forget_clients()


def test_a_store_holds_what_a_folder_would(store: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 200)))
    raw = {"compression": None, "block_len": 16, "shard_bytes": 16_000}  # shards that begin alike, and for long
    settings: dict[str, Any] = builds.config(
        tmp_path, tmp_path / "local", work=str(tmp_path / "work"), retries=2, **raw
    )
    settings["streams"] = {"rows": {"sources": [{"files": [f"{tmp_path}/rows.jsonl"]}]}}
    builds.build_here(settings)
    settings["output"] = store.url
    builds.build_here(settings)
    held = {name: sha256(data).hexdigest() for name, data in store.files.items()}
    held.pop("README.md", None)
    assert held == builds.tree(tmp_path / "local")

    capsys.readouterr()
    builds.build_here(settings)
    assert "is finished: nothing to do" in capsys.readouterr().err
    assert verify_shards.main([store.url]) == 0

    (tmp_path / "manifest.json").write_text("mine")  # not to be taken for the store's
    remote.download(f"{store.url}/manifest.json", tmp_path / "theirs")
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "local" / "manifest.json").read_bytes()
    assert (tmp_path / "manifest.json").read_text() == "mine"

    plan = plan_for([(4, {"rows": 1})], block_len=16)
    sets = [
        MixtureDataset(root=root, cache=str(tmp_path / f"cache{i}"), plan=plan, seed=17)
        for i, root in enumerate((store.url, str(tmp_path / "local")))
    ]
    digests = [[record["tokens"].tobytes() for record in data] for data in sets]
    assert digests[0] == digests[1]


def test_what_is_not_there_is_told_from_what_is_refused(
    store: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Objects(store.url, 1).find("no/such.json") is None
    assert not Objects(store.url, 1).exists("no/such.json")
    with pytest.raises(FileNotFoundError):
        remote.download(f"{store.url}/no/such.json", tmp_path / "file")
    if not store.url.startswith("hf"):
        monkeypatch.setenv("COMPOSER_SFTP_KEY_FILE", str(tmp_path / "sftp keys" / "stranger"))
        remote.forget_clients()
        with pytest.raises(OSError, match="refuses these credentials"):
            remote.download(f"{store.url}/no/such.json", tmp_path / "file")
        with pytest.raises(UserError, match="after 1 attempt: "):
            Objects(store.url, 3).put("file", Path(__file__))


def test_the_hub_is_waited_for_as_long_as_it_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes 128 commits an hour, and says when the next."""
    with hub_with_a_set(monkeypatch) as hub:
        hub.instead["commit"] = [(429, {"Retry-After": "0"})] * 3
        Objects(f"hf://datasets/{SET}", 4).put("file", Path(__file__))
        assert hub.sets[SET]["file"] == Path(__file__).read_bytes()
    assert capsys.readouterr().err.count(" in 0 s") == 3
