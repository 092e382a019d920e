"""Builds from a store into a store that fails in every way a proxy can think of: the bytes of an undisturbed build."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chimera import retries
from chimera.convert.build.store import worker_store
from chimera.convert.read import store_files
from chimera.objects import Objects
from tests.convert import builds
from tests.convert.faults import KINDS, Faults, build_among
from tests.convert.s3_server import S3Server
from tests.faulty_disk import compiled, environment


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with the sources at s3://bucket/raw, read and written through the proxy."""
    folder = tmp_path_factory.mktemp("faults")
    builds.write_sources(folder / "raw")
    with S3Server(folder / "s3", seaweed=True) as server, pytest.MonkeyPatch.context() as patch:
        for key, value in server.environment.items():
            patch.setenv(key, value)
        patch.setattr(retries, "time", SimpleNamespace(sleep=lambda _: None))
        worker_store.cache_clear()
        store_files._objects.cache_clear()
        raw = Objects("s3://bucket/raw")
        for file in (folder / "raw").iterdir():
            raw.put(file.name, file)
        yield server
    store_files._objects.cache_clear()
    worker_store.cache_clear()


def settings(output: str, work: Path, **changes: Any) -> dict[str, Any]:
    found = builds.config(Path("raw"), output, work=str(work), shard_bytes=20_000, retries=4, **changes)
    for stream in found["streams"].values():
        stream["sources"] = [{"files": [f"s3://bucket/{file}" for file in stream["sources"][0]["files"]]}]
    return found


@pytest.fixture(scope="module")
def wanted(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    assert server.faults is None
    folder = tmp_path_factory.mktemp("wanted")
    builds.build_here(settings(str(folder / "out"), folder / "work"))
    return builds.tree(folder / "out")


def objects(output: str) -> dict[str, str]:
    store = Objects(output)
    return {entry.key: sha256(store.get(entry.key)).hexdigest() for entry in store.list()}


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_chaos_a_store_that_fails_in_every_way(server: S3Server, wanted: dict[str, str], tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    stops: list[str] = []
    for n in range(60):
        rng = random.Random(n)
        faults = Faults(rng, rng.choice([4, 10, 30]), KINDS if n % 2 else [rng.choice(KINDS)])
        stops += build_among(faults, server, settings(output := f"s3://bucket/{n}", tmp_path / f"work{n}"))
        assert objects(output) == wanted
        seen.update(faults.seen)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(seen.items()))
    print(f"\nS3: {seen.total()} faults ({counts}) over 60 builds, {len(stops)} stops: each ended byte-identical")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_chaos_a_disk_that_fails_at_any_call(tmp_path: Path) -> None:
    """Each build among faults ends well or in one line with nothing published; the next one ends byte-identical."""
    library, rng = compiled(tmp_path), random.Random(5)
    builds.write_sources(tmp_path / "raw")
    assert builds.run(builds.config(tmp_path / "raw", tmp_path / "out"), tmp_path)[0] == 0
    wanted = builds.tree(tmp_path / "out")
    lines = whole = failed = 0
    for n in range(100):
        folder = tmp_path / str(n)
        folder.mkdir()
        settings = builds.config(tmp_path / "raw", folder / "out", workers=1)
        root = rng.choice([folder / "out", tmp_path / "raw"])
        code, said = builds.run(settings, folder, **environment(library, root, rng))
        failed += root.with_name(f"{root.name}.faults").exists()
        root.with_name(f"{root.name}.faults").unlink(missing_ok=True)
        assert "Traceback" not in said, said
        if code == 0:
            whole += 1
            assert builds.tree(folder / "out") == wanted
        else:
            lines += 1
            assert code == 2, said
            assert not (folder / "out" / "manifest.json").exists(), said
        code, said = builds.run(settings, folder)
        assert code == 0, said
        assert builds.tree(folder / "out") == wanted
        shutil.rmtree(folder)
    print(f"\ndisk: {failed} builds of 100 met a fault, {lines} ended in a line, {whole} went on: all byte-identical")
