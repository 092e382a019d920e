"""Stores of other kinds than S3, spoken to by their real clients: build, build again, verify, read for training."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from convert import verify_shards
from convert.store import Store
from tests.convert import builds
from tests.convert.hub_server import HubServer
from tests.convert.volumes_server import VolumesServer
from tests.train.make_shards import plan_for
from train import remote
from train.mixture import MixtureDataset

SET, VOLUME = "me/shards", "/Volumes/main/default/chimera"


class Loopback:
    """A store at `url`: `files` maps what is below it to bytes."""

    def __init__(self, url: str, stored: dict[str, bytes], prefix: str) -> None:
        self.url, self._stored, self._prefix = url, stored, prefix

    @property
    def files(self) -> dict[str, bytes]:
        return {p.removeprefix(self._prefix): data for p, data in self._stored.items() if p.startswith(self._prefix)}


@pytest.fixture(params=["hf", "hf root", "dbfs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    remote.forget_clients()
    if request.param == "dbfs":
        with VolumesServer() as volumes:
            for key, value in volumes.environment.items():
                monkeypatch.setenv(key, value)
            yield Loopback(f"dbfs:{VOLUME}/en it", volumes.files, f"{VOLUME}/en it/")
    else:
        below = "" if request.param == "hf root" else "2026/en"
        with HubServer({SET: {"README.md": b"# Shards"}}) as hub:
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # as HF_ENDPOINT in a new process
            monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield Loopback(f"hf://datasets/{SET}/{below}".rstrip("/"), hub.sets[SET], f"{below}/".lstrip("/"))
    remote.forget_clients()


def test_a_store_holds_what_a_folder_would(store: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 200)))
    settings: dict[str, Any] = builds.config(tmp_path, tmp_path / "local", work=str(tmp_path / "work"), retries=2)
    settings["streams"] = {"rows": {"sources": [{"files": [f"{tmp_path}/rows.jsonl"]}]}}
    builds.build_here(settings)
    settings["output"] = store.url
    builds.build_here(settings)
    held = {name: sha256(data).hexdigest() for name, data in store.files.items()}
    assert held.pop("builder.json") == sha256(b"{}").hexdigest()  # such stores are not asked to remove it
    held.pop("README.md", None)
    assert held == builds.tree(tmp_path / "local")

    capsys.readouterr()
    builds.build_here(settings)
    assert "is finished: nothing to do" in capsys.readouterr().err
    assert verify_shards.main([store.url]) == 0

    plan = plan_for([(4, {"rows": 1})], block_len=64)
    sets = [
        MixtureDataset(root=root, cache=str(tmp_path / f"cache{i}"), plan=plan, seed=17)
        for i, root in enumerate((store.url, str(tmp_path / "local")))
    ]
    digests = [[record["tokens"].tobytes() for record in data] for data in sets]
    assert digests[0] == digests[1]


def test_what_is_not_there_is_told_from_what_is_refused(
    store: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Store(store.url, tmp_path / "scratch", retries=1).get("no/such.json") is None
    with pytest.raises(FileNotFoundError):
        remote.download(f"{store.url}/no/such.json", tmp_path / "file")
    if store.url.startswith("dbfs"):
        monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-wrong")
        remote.forget_clients()
        with pytest.raises(OSError, match="access denied"):
            remote.download(f"{store.url}/no/such.json", tmp_path / "file")
