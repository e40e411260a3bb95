"""Capture the predictions of a network, at whatever place of its output they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.outputs import select_output


def prediction_of(found: Any, output: str | int | None, who: str) -> Tensor:
    """Return the prediction in what a network returned, with the classes in the second dimension.

    Args:
        found: What the network returned.
        output: The place of the prediction, as for `core.outputs.select_output`. Three dimensions of `.logits` are
            (samples, positions, classes), as transformers orders them, and come back as (samples, classes, positions),
            as torch's cross entropy takes them.
        who: Name of the network, for the message.

    Raises:
        ValueError: There is no tensor at that place.

    Example:
        >>> prediction_of({"scores": torch.ones(2), "loss": 0.0}, "scores", "network")
        tensor([1., 1.])
    """
    picked = select_output(found, output, who, remedy="pass network= with the submodule that returns the prediction")
    positions = output is None and not isinstance(found, Tensor) and picked.dim() == 3
    return picked.movedim(-1, 1) if positions else picked


class OutputCapture:
    """Keeps the predictions that a network makes while it is watched, with their graph.

    Args:
        network: The module whose output is, or contains, the prediction.
        output: The place of the prediction in that output, as for `prediction_of`.
        criterion: The criterion's name, for error messages.
    """

    def __init__(self, network: nn.Module, output: str | int | None, *, criterion: str) -> None:
        self.network = network
        self.output = output
        self.criterion = criterion
        self._predictions: list[Tensor] = []
        self._finished = 0
        self._finished_at_entry: list[int] = []

    def watch(self) -> list[RemovableHandle]:
        """Put hooks on the network, and return them; the caller removes them."""
        return [
            self.network.register_forward_pre_hook(self._enter),
            self.network.register_forward_hook(self._leave),
        ]

    def take(self) -> list[Tensor]:
        """Return the predictions made since the last call of this method, and forget them.

        Raises:
            ValueError: The network has not been called at all since `clear`.
        """
        if self._finished == 0:
            raise ValueError(
                f"criterion={self.criterion!r} needs the network's output, but the training step never called "
                f"{type(self.network).__name__}.forward: pass network= with the submodule that it does call."
            )
        predictions, self._predictions = self._predictions, []
        return predictions

    def clear(self) -> None:
        """Forget the predictions, so that their graph is freed."""
        self._predictions.clear()
        self._finished = 0
        self._finished_at_entry.clear()

    def _enter(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._finished_at_entry.append(self._finished)

    def _leave(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Under DistributedDataParallel Lightning runs training_step inside the module's own __call__: only the
        # innermost call returns a prediction.
        is_innermost = self._finished == self._finished_at_entry.pop()
        self._finished += 1
        if is_innermost and torch.is_grad_enabled():
            self._predictions.append(prediction_of(output, self.output, type(network).__name__))
