"""What most tests of builds read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chimera.convert.build.store import worker_store
from tests.convert import builds
from tests.convert.s3_server import S3Server


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of every kind; a module's own, as its tests may change them."""
    folder = tmp_path_factory.mktemp("sources")
    builds.write_sources(folder)
    return folder


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    worker_store.cache_clear()  # another test's server
    with S3Server(tmp_path / "s3") as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        yield server
