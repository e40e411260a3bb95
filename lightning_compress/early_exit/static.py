"""A network up to one exit, as a module that returns the output alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Static(nn.Module):
    """The layers up to an exit, and its head."""

    def __init__(self, stage: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.stage, self.head = stage, head

    def forward(self, *args: Any) -> Tensor:
        found: Tensor = self.stage(*args)
        return found if self.head is None else self.head(found)


class WholeStatic(nn.Module):
    """A network that cannot be cut, left at an exit by an exception in a hook."""

    def __init__(self, early: nn.Module, exit: int) -> None:
        super().__init__()
        self.early, self.exit = early, exit

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = self.early(*args, exit=self.exit, **kwargs)[0]
        return answer
