from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.launch import Ranks, Workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Ranks live for the whole session: a job on warm ranks takes a second, a start ten."""
    folder = tmp_path_factory.mktemp("distributed")
    with Ranks(1, folder) as one, Ranks(2, folder) as two:
        yield Workspace(folder, one, two)
