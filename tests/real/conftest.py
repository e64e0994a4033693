from __future__ import annotations

from collections.abc import Iterator

import pytest

from tagllm.ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A world of one in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield Ranks.start(60)  # left in place: DeepSpeed remembers the group
