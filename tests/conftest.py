from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.ranks import RankPair


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers (make test), tests that share something costly run in the same one."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")  # type: ignore[attr-defined]
        shared = "ranks" if "rank_pair" in item.fixturenames else f"{item.path.name} {entry}"  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(shared))


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
