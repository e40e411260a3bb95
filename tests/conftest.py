from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.ranks import RankPair


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _pair() -> Iterator[list[RankPair]]:
    holder: list[RankPair] = []
    yield holder
    for pair in holder:
        pair.close()


@pytest.fixture
def rank_pair(_pair: list[RankPair]) -> RankPair:
    """The pair of ranks that all tests share; a job that failed has taken its pair with it."""
    if not _pair or not _pair[-1].alive:
        _pair.append(RankPair())
    return _pair[-1]
