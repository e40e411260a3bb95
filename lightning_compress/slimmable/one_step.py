"""One step of a module with widths: the real step, in which the full network runs, and the replays at other widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_compress.core.answering import answering
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.outputs import select_output
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.trainer.one_step import OneStep


class WidthsStep(OneStep):
    """A batch on its way through a module with widths, whose replays run thinner networks.

    Args:
        args, kwargs: Of `OneStep`.
        widths: By label of the replay.
        thin: Returns the network of a width.
    """

    def __init__(
        self, *args: Any, widths: Mapping[str, float], thin: Callable[[float], ThinNetwork], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.widths, self.thin = widths, thin
        self._outputs: dict[str, Any] = {}

    def _end(self, output: Any) -> None:
        self.before.check_batch()  # the next replay's network gets the same tensors
        super()._end(output)

    @contextmanager
    def answer(self, label: str) -> Iterator[None]:
        thin = self.thin(self.widths[label])
        thin.refresh(gradients=torch.is_grad_enabled())

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._outputs[label] = found = thin.module.forward(*args, **kwargs)
            return found

        with answering(self.network, forward, by=thin.module):
            yield

    def logits_of(self, label: str) -> Tensor:
        return select_output(self._outputs[label], self.picks, "The network")


def inputs_of(one: OneStep, *, samples: int | None = None) -> ExampleInputs:
    """Return copies of what a step has called the network with.

    Args:
        one: The step.
        samples: How many samples, at most; None: all.

    Raises:
        ValueError: It has used positional and keyword arguments together.
    """
    args, kwargs = one.inputs
    if args and kwargs:
        raise ValueError(
            "The network is called with positional and with keyword arguments, with which the statistics of its norms "
            "can't be computed anew: call it with one kind."
        )
    given = kwargs or args if samples is None else first_samples(kwargs or args, samples)
    copied: ExampleInputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), given)
    return copied
