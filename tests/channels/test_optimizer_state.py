"""An optimizer's memory of a parameter is cut like it where that is known to be right, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.optimizer_state import check_state, forget_unsliceable, slice_state
from lightning_compress.core.tensors import select

Remember = Callable[[Tensor], dict[str, Any]]
KEEP = torch.tensor([0, 2])


class Remembering(torch.optim.Optimizer):
    """Keeps what a function says of every parameter that it steps."""

    def __init__(self, parameters: Any, remember: Remember, **group: Any) -> None:
        super().__init__(parameters, {"lr": 0.1} | group)
        self.remember = remember

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].update(self.remember(parameter))


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for one in made:
        one.grad = torch.randn_like(one)
    return made


def rows_and_columns(parameter: Tensor) -> dict[str, Any]:
    square = parameter.detach().square()
    return {"exp_avg_sq_row": square.mean(-1), "exp_avg_sq_col": square.mean(-2), "RMS": square.mean().sqrt()}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (4, 3, 4, 4)])
def test_rows_and_columns_of_factored_moments_follow_their_own_dimension(shape: tuple[int, ...], dim: int) -> None:
    (parameter,) = parameters(shape)
    optimizer = Remembering([parameter], rows_and_columns)
    optimizer.step()
    before = dict(optimizer.state[parameter])
    undo = slice_state(optimizer, parameter, {dim: KEEP}, select)
    row, column = before["exp_avg_sq_row"], before["exp_avg_sq_col"]
    row_dim = dim if dim < len(shape) - 1 else None  # the last dimension of the parameter is no dimension of a row
    column_dim = {len(shape) - 1: len(shape) - 2}.get(dim, dim if dim < len(shape) - 2 else None)
    after = optimizer.state[parameter]
    assert torch.equal(after["exp_avg_sq_row"], row if row_dim is None else row.index_select(row_dim, KEEP))
    assert torch.equal(after["exp_avg_sq_col"], column if column_dim is None else column.index_select(column_dim, KEEP))
    assert after["RMS"] is before["RMS"]
    undo()
    assert all(optimizer.state[parameter][name] is value for name, value in before.items())


REFUSED: dict[str, tuple[Remember, list[tuple[int, ...]]]] = {
    "a map of as many levels as rows": (lambda p: {"qmap1": torch.linspace(-1, 1, 4)}, [(4, 3), (4, 5)]),
    "a map of as many levels as entries": (lambda p: {"qmap1": torch.linspace(-1, 1, 4)}, [(4,)]),
    "quantized blocks": (lambda p: {"exp_avg": torch.zeros(p.shape, dtype=torch.uint8)}, [(4, 3)]),
    "a preconditioner": (lambda p: {"precondition": torch.eye(p.shape[0])}, [(4, 4)]),
    "a list of preconditioners": (lambda p: {"exp_avg": p * 1, "GG": [torch.eye(n) for n in p.shape]}, [(4, 3)]),
    "a sketch": (lambda p: {"sketch": torch.zeros(7)}, [(4, 3)]),
    "a scale of each block": (lambda p: {"absmax1": torch.zeros(3)}, [(4, 3)]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_may_be_something_else_is_refused(kind: str) -> None:
    remember, shapes = REFUSED[kind]
    its = parameters(*shapes)
    optimizer = Remembering(its, remember)
    with pytest.raises(ValueError, match=r"Remembering keeps '.*which cannot be cut like it"):
        check_state(optimizer, its)
    assert not optimizer.state  # it was a twin that took a step
    optimizer.step()
    with pytest.raises(ValueError, match=r"Remembering keeps '.*which cannot be cut like it"):
        slice_state(optimizer, its[0], {0: KEEP}, select)
    assert "which cannot be cut like it" in str(forget_unsliceable(optimizer, its))
    assert all(not optimizer.state[one] for one in its)


def test_what_has_the_shape_of_all_parameters_is_cut_whatever_its_name() -> None:
    its = parameters((4, 3), (4,))
    optimizer = Remembering(its, lambda p: {"m": p.detach().clone(), "age": 3})
    check_state(optimizer, its)
    optimizer.step()
    assert forget_unsliceable(optimizer, its) is None
    for one in its:
        slice_state(optimizer, one, {0: KEEP}, select)
        assert torch.equal(optimizer.state[one]["m"], one.detach()[KEEP])
        one.data = one.data[KEEP]


def test_what_several_parameters_share_is_refused() -> None:
    its = parameters((4, 3), (4,))
    optimizer = Remembering(its, lambda p: {}, spectrum=torch.zeros(4))
    with pytest.raises(ValueError, match="keeps 'spectrum' for several parameters together"):
        check_state(optimizer, its)


def test_an_optimizer_inside_another_follows() -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            self.base.step()

    its = parameters((4, 3))
    optimizer = Wrapped(its)
    weight = its[0].detach().clone()
    check_state(optimizer, its)
    assert torch.equal(its[0], weight)
    assert not optimizer.base.state
    optimizer.step()
    momentum = optimizer.base.state[its[0]]["momentum_buffer"].clone()
    slice_state(optimizer, its[0], {0: KEEP}, select)
    assert torch.equal(optimizer.base.state[its[0]]["momentum_buffer"], momentum[KEEP])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_torchs_own_follow(kind: Any) -> None:
    its = parameters((4, 4))
    optimizer = kind(its)
    check_state(optimizer, its)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[its[0]].items()}
    slice_state(optimizer, its[0], {1: KEEP}, select)
    for name, value in optimizer.state[its[0]].items():
        assert torch.equal(value, before[name][:, KEEP] if value.dim() else before[name])
