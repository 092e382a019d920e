"""What all tests share: settings for few and busy cores."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.warm import Warm

ROOT = Path(__file__).resolve().parents[1]

# Tests run side by side, where threads that spin for work cost the most.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is slow at times, and so is the first example (Hypothesis builds its Unicode tables then).
settings.register_profile("chimera", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("chimera")


@pytest.fixture(scope="session", autouse=True)
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its examples and tables, which it would keep below the folder pytest runs in."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `python` and `composer` that start at once (warm.py), or with the real ones where none can."""
    forks = Warm(tmp_path_factory.mktemp("warm"))
    yield forks.folder if forks.ready else Path(sys.executable).parent
    forks.stop()


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache folder for all test processes, not the user's: an engine's sweep of all characters is done once."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True)
def no_new_names_in_the_checkout() -> Iterator[None]:
    """Fail a test after which the checkout's top folder holds something new: what runs there writes `demo`, `runs`, ...

    Files of caches (`.pytest_cache`, `__pycache__`) and of the other test processes' coverage are no test's.
    """
    before = set(os.listdir(ROOT))
    yield
    new = {name for name in os.listdir(ROOT) if not name.startswith((".", "__pycache__"))} - before
    assert not new, f"written in the checkout: {sorted(new)}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` import tests/gpu alone: a machine with a GPU may lack what the other tests import."""
    if config.option.markexpr != "gpu" or collection_path.is_dir():
        return None
    return None if collection_path.parent.name == "gpu" else True
