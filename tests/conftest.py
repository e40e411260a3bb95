from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest
import torch
from support.ranks import RankPair


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Skip what torch.export could not do before 2.13 or so, where the package says so and nothing else is wrong."""
    try:
        return (yield)
    except ValueError as error:
        if torch.__version__ < "2.13" and "use torch 2.13, which exports more" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out the imported modules and the collected tests, which stay to the end."""
    gc.collect()
    gc.freeze()


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
