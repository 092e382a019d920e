"""What most tests of builds read."""

from pathlib import Path

import pytest

from tests.convert import builds


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of every kind; a module's own, as its tests may change them."""
    folder = tmp_path_factory.mktemp("sources")
    builds.write_sources(folder)
    return folder
