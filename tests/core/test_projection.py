from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.core.projection import Projection


def signs(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.sign_()


def test_latent_values_train_as_in_binary_connect() -> None:
    """Against BinaryConnect written out by hand: gradient at sign(w), update of w."""
    torch.manual_seed(0)
    x, y, start = torch.randn(20, 4), torch.randn(20), torch.randn(4)

    by_hand = start.clone()
    for _ in range(30):
        binary = by_hand.sign().requires_grad_()
        ((x @ binary - y) ** 2).mean().backward()
        by_hand = by_hand - 0.05 * binary.grad

    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=0.05)
    projection = Projection({"w": weight}, signs, keep_latent=True)
    projection.project()
    for _ in range(30):
        assert torch.equal(weight.detach(), weight.detach().sign())
        optimizer.zero_grad()
        ((x @ weight - y) ** 2).mean().backward()
        projection.open(optimizer)
        optimizer.step()
        projection.close(optimizer)
    assert torch.allclose(projection.latent["w"], by_hand, atol=1e-6)


def test_each_optimizer_opens_its_own_parameters() -> None:
    a, b = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([0.4]))
    projection = Projection({"a": a, "b": b}, signs, keep_latent=True)
    projection.project()
    optimizer = torch.optim.SGD([a], lr=0.1)
    projection.open(optimizer)
    assert (a.item(), b.item()) == (pytest.approx(0.3), 1.0)
    projection.close(optimizer)
    assert (a.item(), b.item()) == (1.0, 1.0)


def test_a_step_that_never_came_leaves_the_projection_in_place() -> None:
    weight = nn.Parameter(torch.tensor([0.3]))
    projection = Projection({"w": weight}, signs, keep_latent=True)
    projection.project()
    projection.open()
    projection.settle()
    assert weight.item() == 1.0
    assert projection.latent["w"].item() == pytest.approx(0.3)


def test_an_unannounced_step_is_refused() -> None:
    weight = nn.Parameter(torch.tensor([0.3]))
    projection = Projection({"w": weight}, signs, keep_latent=True)
    with pytest.raises(RuntimeError, match="on_before_optimizer_step"):
        projection.close(torch.optim.SGD([weight], lr=0.1))


def test_parameters_keep_their_identity() -> None:
    weight = nn.Parameter(torch.tensor([0.3, -2.0]))
    address = weight.data_ptr()
    projection = Projection({"w": weight}, signs, keep_latent=True)
    projection.project()
    assert weight.data_ptr() == address
