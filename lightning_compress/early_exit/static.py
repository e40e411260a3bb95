"""Networks with exits as modules that return the output alone, at one exit or as their rule says."""

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


class Served(nn.Module):
    """A network with exits that is called as the plain network, and returns outputs alone.

    Args:
        early: The network.
        options: `exit` or `budget` of its calls.
    """

    def __init__(self, early: nn.Module, **options: Any) -> None:
        super().__init__()
        self.early, self.options = early, options

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = self.early(*args, **kwargs, **self.options)[0]
        return answer
