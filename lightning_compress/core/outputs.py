"""Run a network reproducibly, and compare the outputs of two networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import buffers_restored, caches_off, entries_restored, renew_caches
from lightning_compress.core.example_inputs import ExampleInputs, call

TOLERANCE = 1e-8  # relative, in double precision: rounding stays far below it, an error far above


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """Return None if two lists of tensors agree, or else a text that describes the difference."""
    if [one.shape for one in got] != [one.shape for one in expected]:
        shapes = ([tuple(one.shape) for one in some] for some in (got, expected))
        return "its output has shapes {}, not {}".format(*shapes)
    for one, other in zip(map(_real, got), map(_real, expected), strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return "its integer output differs"
            continue
        if bool(other.isnan().any()):
            return "the dense network's output is not a number, so that nothing can be compared"
        finite = other.isfinite()
        if not torch.equal(one.masked_fill(finite, 0).nan_to_num(), other.masked_fill(finite, 0).nan_to_num()):
            return "its output has other infinite values"
        scale = float(other[finite].abs().max()) if bool(finite.any()) else 0.0
        difference = float((one[finite] - other[finite]).abs().max()) if bool(finite.any()) else 0.0
        if not difference <= tolerance * max(scale, math.ulp(1.0)):
            return f"its output differs by {difference / scale if scale else math.inf:.2g} of its size"
    return None


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def run(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """Return the tensors of the model's output, which are the same at every call: see `alike`."""
    return alike(model, lambda: call(model, example_inputs))


def alike(model: nn.Module, forward: Callable[[], Any]) -> list[Tensor]:
    """Call the model with fixed random seeds, and return the tensors of its output.

    Modules renew the caches that they keep for evaluation before; buffers, caches and counters are restored after.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with caches_off(model), entries_restored(model), buffers_restored(model):
        renew_caches(model)
        return tensors_of(forward())


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in an output, detached and in order."""
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
