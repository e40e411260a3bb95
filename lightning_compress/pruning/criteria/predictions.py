"""Capture the predictions of a network, at whatever place of its output they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def select_output(output: Any, selector: str | int | None = None) -> Tensor:
    """Pick the prediction out of a network's output.

    Args:
        output: The value that `forward` returned.
        selector: A key or attribute name, an index, or None for an output that is a tensor or has `.logits`. Three
            dimensions of `.logits` are (samples, positions, classes), as transformers orders them, and come back as
            (samples, classes, positions), as torch's cross entropy takes them.

    Raises:
        ValueError: There is no tensor at that place.

    Example:
        >>> select_output({"scores": torch.ones(2), "loss": 0.0}, "scores")
        tensor([1., 1.])
    """
    if isinstance(output, Tensor) and selector is None:
        return output
    found: Any = None
    if selector is None:
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    elif isinstance(selector, int):
        if isinstance(output, tuple | list) and -len(output) <= selector < len(output):
            found = output[selector]
    else:
        found = output.get(selector) if isinstance(output, Mapping) else getattr(output, selector, None)
    if not isinstance(found, Tensor):
        keys = f" with keys {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
        sought = "is neither a tensor nor has .logits" if selector is None else f"has no tensor at {selector!r}"
        raise ValueError(
            f"The network's output is a {type(output).__name__}{keys} and {sought}: pass network= with "
            "the submodule that returns the prediction."
        )
    return found.movedim(-1, 1) if selector is None and found.dim() == 3 else found


class OutputCapture:
    """Keeps the predictions that a network makes while it is watched, with their graph.

    Args:
        network: The module whose output is, or contains, the prediction.
        output: The place of the prediction in that output, as for `select_output`.
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
            self._predictions.append(select_output(output, self.output))
