"""Find example inputs for a technique that must trace the network, where the user has passed none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import entries_restored, evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call, to_device, to_type
from lightning_compress.trainer.peek import first_batch
from lightning_compress.trainer.unwrap import innermost


def resolve_network(pl_module: LightningModule, network: str) -> nn.Module:
    """Return the submodule at the dotted path `network`, or the user's LightningModule itself for an empty path.

    Raises:
        ValueError: There is no such submodule.
    """
    pl_module = innermost(pl_module)
    try:
        return pl_module.get_submodule(network)
    except AttributeError as error:
        children = ", ".join(repr(name) for name, _ in pl_module.named_children())
        raise ValueError(
            f"network={network!r} is no submodule of {type(pl_module).__name__}, whose children are {children}."
        ) from error


def traced_network(
    trainer: Trainer, pl_module: LightningModule, network: str, given: ExampleInputs | None
) -> tuple[nn.Module, ExampleInputs]:
    """Return the submodule in which to find channels, and the example inputs to trace it with.

    Raises:
        ValueError: There is no such submodule, or it is the LightningModule and has no forward.
    """
    module = resolve_network(pl_module, network)
    if not network and not is_overridden("forward", pl_module):
        raise ValueError(
            f"{type(pl_module).__name__} has no forward to find its channels with: pass network= with the path of the "
            f"submodule whose output is the prediction."
        )
    return module, resolve_example_inputs(trainer, pl_module, module, given)


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether torch.compile was applied to the LightningModule or to one of its submodules."""
    inside = any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )
    return inside or getattr(pl_module, "_compiler_ctx", None) is not None


def resolve_example_inputs(trainer: Trainer, pl_module: LightningModule, network: nn.Module, given: Any) -> Any:
    """Return example inputs on the module's device: the given ones, `example_input_array`, or those of a batch."""

    def move(inputs: Any) -> Any:
        return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(inputs))

    return move(given_or_peeked(trainer, pl_module, network, given, move))


def inputs_on_device(module: LightningModule, network: nn.Module, given: Any) -> Any:
    """Return example inputs on the network's device and of its type, before the strategy exists."""
    like = next((one for one in network.parameters() if one.is_floating_point()), torch.empty(()))

    def move(inputs: Any) -> Any:
        return to_type(to_device(inputs, like.device), like.dtype)

    return move(given_or_peeked(module.trainer, module, network, given, move))


def given_or_peeked(
    trainer: Trainer, pl_module: LightningModule, network: nn.Module, given: Any, move: Callable[[Any], Any]
) -> Any:
    """Return example inputs on their own device: the given ones, `example_input_array`, or those of a batch.

    A fit reads one batch for this, once, and leaves the loader and the random states unchanged.

    Args:
        trainer: The Trainer with the training loader.
        pl_module: The LightningModule, which may have an `example_input_array`.
        network: The network to call with the inputs.
        given: The inputs that the user has passed, or None.
        move: Moves inputs to the network's device.

    Raises:
        ValueError: No part of the batch is an input with which the network runs.
    """
    if given is None:
        given = getattr(pl_module, "example_input_array", None)
    if given is not None:
        return given
    if trainer not in _peeked:
        _peeked[trainer] = _Peeked(first_batch(trainer))
    peeked = _peeked[trainer]
    if network not in peeked.inputs:
        peeked.inputs[network] = inputs_of(peeked.batch, network, move)
    return peeked.inputs[network]


@dataclass
class _Peeked:
    """A batch, and the part of it with which each traced network is called."""

    batch: Any
    inputs: WeakKeyDictionary[nn.Module, Any] = field(default_factory=WeakKeyDictionary)


_peeked: WeakKeyDictionary[Trainer, _Peeked] = WeakKeyDictionary()


def forget_batch(trainer: Trainer) -> None:
    """Forget the batch of a fit, so that the next fit reads its own data."""
    _peeked.pop(trainer, None)


def inputs_of(batch: Any, network: nn.Module, move: Callable[[Any], Any] = lambda inputs: inputs) -> Any:
    """Return the smallest part of a batch with which the network's forward runs.

    Raises:
        ValueError: The forward runs with no part of the batch.
    """
    guesses = _guesses(batch, inspect.signature(network.forward).parameters)
    errors = []
    for guess in guesses:
        try:
            with evaluating(network), entries_restored(network), torch.compiler.set_stance("force_eager"):
                call(network, move(guess))
        except Exception as error:  # whatever the network's code raises
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            errors.append(f"with {_described(guess)} it raises {first_line}")
            continue
        if len(guesses) > 1:
            rank_zero_info(
                f"{type(network).__name__} is traced with {_described(guess)} of a training batch. If the training "
                f"step calls it with something else, pass example_inputs=."
            )
        return guess
    reasons = f" ({'; '.join(errors)})" if errors else ""
    raise ValueError(
        f"The training loader yields {_described(batch)}, in which no inputs of {type(network).__name__} were "
        f"found{reasons}: pass example_inputs= (a tensor, a tuple of positional "
        f"arguments or a dict of keyword arguments), or set example_input_array on the LightningModule."
    )


def inputs_of_batches(batches: Sequence[Any], network: nn.Module, move: Callable[[Any], Any]) -> list[Any]:
    """Return the part of each batch with which the network's forward runs, on its device: the same of all of them.

    Raises:
        ValueError: The forward runs with no part of the first batch.
    """
    if not batches:
        return []
    first, names = inputs_of(batches[0], network, move), inspect.signature(network.forward).parameters
    place = next((n for n, one in enumerate(_guesses(batches[0], names)) if _same(one, first)), 0)
    return [move(_guesses(batch, names)[place]) for batch in batches]


def _same(one: Any, other: Any) -> bool:
    leaves, others = tree_leaves(one), tree_leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


_LABELS = ("labels", "label", "label_ids", "targets", "target", "y")


def _guesses(batch: Any, parameters: Mapping[str, inspect.Parameter]) -> list[Any]:
    """Return the parts of a batch with which a forward with these parameters could be called, the likeliest first."""
    kinds = [one.kind for one in parameters.values()]
    places = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = sum(one.default is one.empty for one in places)
    if isinstance(batch, Mapping):
        free = inspect.Parameter.VAR_KEYWORD in kinds
        fits = {key: value for key, value in batch.items() if free or key in parameters}
        needed = {one.name for one in parameters.values() if one.default is one.empty}
        bare = {key: value for key, value in fits.items() if key not in _LABELS or key in needed}
        whole = [(batch,)] if required == 1 else []
        return [*([bare] if bare else []), *([fits] if len(fits) > len(bare) else []), *whole]
    if isinstance(batch, list | tuple) and len(batch) > 0:
        most = len(batch) if inspect.Parameter.VAR_POSITIONAL in kinds else min(len(places), len(batch))
        first, is_nested = batch[0], isinstance(batch[0], Mapping | list | tuple)
        flat: list[Any] = [tuple(batch[:n]) for n in range(max(required, 1), most + 1)]
        flat = [one[0] if len(one) == 1 and isinstance(one[0], Tensor) else one for one in flat]
        nested = _guesses(first, parameters) if is_nested else []
        return [*nested, *flat] if required != 1 else [*flat, *nested]
    return [batch] if isinstance(batch, Tensor) else []


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, Mapping):
        return f"{type(found).__name__}({', '.join(map(str, found))})"
    if isinstance(found, list | tuple):
        return f"{type(found).__name__}({', '.join(map(_described, found))})"
    return type(found).__name__
