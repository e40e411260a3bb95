"""Run a network reproducibly, pick a tensor from its output, and compare the outputs of two networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import buffers_restored, caches_off, entries_restored, renew_caches
from lightning_compress.core.example_inputs import ExampleInputs, call

TOLERANCE = 1e-8  # relative, in double precision: rounding stays far below it, an error far above

# largest difference of two networks that compute the same, relative to the largest output
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


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


def select_output(
    found: Any,
    output: str | int | None,
    who: str,
    *,
    remedy: str = "pass output= with the key, position or attribute of a tensor",
) -> Tensor:
    """Return the tensor that `output` picks from what a network or layer returned.

    Args:
        found: A tensor, which is returned itself, or a dict, tuple, list or object that contains one.
        output: Key, position or attribute of the tensor; None: `logits`, as in networks of `transformers`.
        who: Name of the network or layer, for the message.
        remedy: What the user can do where no tensor is found, for the message.

    Raises:
        ValueError: There is no such entry, or it is no tensor.

    Example:
        >>> select_output({"logits": Tensor([1.0])}, "logits", "network")
        tensor([1.])
    """
    picked: Any = found
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if output is None and isinstance(logits, Tensor):
        return logits
    if output is not None and not isinstance(
        found, Tensor
    ):  # one of two networks with the same `output` may return just the tensor
        try:
            if isinstance(found, Mapping | tuple | list) and not (isinstance(output, str) and hasattr(found, output)):
                picked = found[output]  # type: ignore[index]  # a selector that does not fit is refused below
            else:
                picked = getattr(found, str(output))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{who} returns {_described(found)}, which has no output={output!r}: choose another one."
            ) from error
    if not isinstance(picked, Tensor):
        what = _described(picked) if output is None else f"{_described(picked)} as output={output!r}"
        raise ValueError(f"{who} returns {what}, and no tensor: {remedy}.")
    return picked


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} with {', '.join(map(repr, found))}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return f"a {type(found).__name__}"
