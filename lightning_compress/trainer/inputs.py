"""Where a technique must trace the network: what to feed it when the user named nothing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_compress.core.inputs import ExampleInputs
from lightning_compress.trainer import rng
from lightning_compress.trainer.inside import innermost


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
    """Return the submodule in which channels are looked for, and what it is traced with.

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
    inside = any(isinstance(module, torch._dynamo.OptimizedModule) for module in pl_module.modules())
    return inside or getattr(pl_module, "_compiler_ctx", None) is not None


def resolve_example_inputs(trainer: Trainer, pl_module: LightningModule, network: nn.Module, given: Any) -> Any:
    """Return example inputs on the module's device: the given ones, else `example_input_array`, else a peeked batch.

    Peeking leaves the random states and a stateful loader's position as they were.
    """
    found = given_or_peeked(trainer, pl_module, network, given)
    return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(found))


def given_or_peeked(trainer: Trainer, pl_module: LightningModule, network: nn.Module, given: Any) -> Any:
    """Return example inputs as they come: the given ones, else `example_input_array`, else a peeked batch."""
    if given is None:
        given = getattr(pl_module, "example_input_array", None)
    return inputs_of(_peek(trainer), network) if given is None else given


def _peek(trainer: Trainer) -> Any:
    combined = trainer.fit_loop._combined_loader
    if combined is None:  # before the fit has set it up
        combined = CombinedLoader(trainer.fit_loop._data_source.dataloader())
    loader = next(iter(combined.flattened))
    random_states = rng.capture()
    position = loader.state_dict() if hasattr(loader, "load_state_dict") else None
    try:
        return next(iter(loader))
    finally:
        rng.restore(random_states)
        if position is not None:
            loader.load_state_dict(position)


def inputs_of(batch: Any, network: nn.Module) -> Any:
    if isinstance(batch, dict):
        accepted = inspect.signature(network.forward).parameters
        return {key: value for key, value in batch.items() if key in accepted}
    if isinstance(batch, list | tuple):
        return batch[0]
    if isinstance(batch, torch.Tensor):
        return batch
    raise ValueError(
        f"The training loader yields {type(batch).__name__}, from which the network's inputs can't be told: pass "
        f"example_inputs=, or set example_input_array on the LightningModule."
    )
