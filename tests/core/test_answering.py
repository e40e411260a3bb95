"""Another function answers the calls of a network, and the network is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.core.answering import Answer, answering, answering_now, put


def test_the_module_that_computes_is_known_in_nested_blocks() -> None:
    network, thin = nn.Linear(2, 3), nn.Linear(2, 1)
    x = torch.zeros(1, 2)
    with answering(network, thin.forward, by=thin):
        with answering(network, lambda x: "said"):  # such as an output that was captured from the thin network
            assert network(x) == "said"
            assert answering_now(network) is thin
        assert network(x).shape == (1, 1)
    assert network(x).shape == (1, 3)
    assert "forward" not in vars(network)


def test_an_error_in_the_block_leaves_the_network_as_it_was() -> None:
    network = nn.Linear(2, 3)
    own = vars(network)["forward"] = lambda x: x
    with pytest.raises(ZeroDivisionError), answering(network, lambda x: None):
        raise ZeroDivisionError
    assert vars(network)["forward"] is own
    assert "_compiled_call_impl" not in vars(network)


def test_what_is_put_stays_until_it_is_taken_back() -> None:
    network, thin = nn.Linear(2, 3), nn.Linear(2, 1)
    put(network, Answer(thin.forward, thin))
    assert answering_now(network) is thin
    assert network(torch.zeros(1, 2)).shape == (1, 1)
    put(network, None)
    assert answering_now(network) is network
    assert network(torch.zeros(1, 2)).shape == (1, 3)
