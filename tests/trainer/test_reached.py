"""What the code of `forward` uses of a LightningModule."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_compress.trainer.reached import reached_by_forward


class Parts(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.deep = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)})
        self.act = torch.tanh
        self.width = 2


class Plain(Parts):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.act(self.a(x)).view(-1, self.width) * scale


class Deeper(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.deep.x(x) + self.deep["x"](x)


class Looped(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("x", "y"):
            x = self.deep[name](x)
        return x


class Helpers(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.log_dict({})
        return self.head(self._encode(x))

    def _encode(self, x: Tensor) -> Tensor:
        return (lambda y: self.a(y))(x)

    @property
    def head(self) -> nn.Module:
        return self.b

    def unused(self, x: Tensor) -> Tensor:
        return self.c(x)


class Inherited(Plain):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(super().forward(x))


class Mixin:
    def encode(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.b(x)  # type: ignore[attr-defined]
        return encoded


class Mixed(Parts, Mixin):
    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class OwnWeight(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Plain, {"a"}),
        (Deeper, {"deep.x"}),
        (Looped, {"deep"}),
        (Helpers, {"a", "b"}),
        (Inherited, {"a", "b"}),
        (Mixed, {"b"}),
        (Decorated, {"a"}),
        (OwnWeight, {"weight"}),
    ],
)
def test_the_code_names_what_it_uses(kind: type[Parts], expected: set[str]) -> None:
    assert reached_by_forward(kind()) == expected


def apply_all(module: Any, x: Tensor) -> Tensor:
    applied: Tensor = module.c(x)
    return applied


class GivenAway(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return apply_all(self, x)


class ByName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = getattr(self, "a")(x)  # noqa: B009
        return made


class AllOfThem(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class InAList(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.c, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for one in self.order:
            x = one(x)
        return self.a(x)


class InAClosure(Parts):
    def __init__(self) -> None:
        super().__init__()
        layer = self.c
        self.run = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.a(x))


class InAPartial(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(self.c.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.a(x))


class SetOnTheObject(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.c.forward  # type: ignore[method-assign]


class NoForward(Parts):
    pass


@pytest.mark.parametrize(
    "kind", [GivenAway, ByName, AllOfThem, InAList, InAClosure, InAPartial, SetOnTheObject, NoForward]
)
def test_code_that_may_use_more_than_it_names_tells_nothing(kind: type[Parts]) -> None:
    assert reached_by_forward(kind()) is None
