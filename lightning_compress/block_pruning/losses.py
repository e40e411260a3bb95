"""The loss of a module's own step without some residual blocks, on a few training batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.block_pruning.plan import without
from lightning_compress.core.distributed import all_reduce_sum
from lightning_compress.core.evaluation import entries_restored, evaluating
from lightning_compress.stages.block import Block
from lightning_compress.trainer.peek import first_batches, training_loaders, untouched
from lightning_compress.trainer.unwrap import innermost


def check_steps(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise a ValueError unless the module's step can be run between those of the fit, on batches of its loader."""
    kind, remedy = type(innermost(pl_module)).__name__, "use criterion='influence'"
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"criterion='loss' runs the training_step of {kind} to compare losses, but with manual optimization that "
            f"step trains: {remedy}."
        )
    loaders = training_loaders(trainer)
    if len(loaders) > 1:
        raise ValueError(
            f"criterion='loss' reads batches of one training loader, and there are {len(loaders)}: {remedy}."
        )
    try:
        with untouched(loaders[0]):
            pass
    except ValueError as error:
        raise ValueError(f"criterion='loss' reads batches anew at each event: {error} Or {remedy}.") from error


def loss_of_blocks(
    trainer: Trainer, pl_module: LightningModule, network: nn.Module, n_batches: int
) -> Callable[[Sequence[Block]], float]:
    """Return a function that computes the mean loss without some blocks, the same on all ranks.

    The module's own `training_step` runs in evaluation mode, on the same batches at each call. Nothing is logged, and
    metrics, counters, random states, the loader and the statistics of norms are as they were.

    Args:
        trainer: Of the fit, with one training loader.
        pl_module: The LightningModule.
        network: The part of it that has the blocks.
        n_batches: How many batches to read.

    Raises:
        ValueError: The loader yields nothing, or the step returns no loss.
    """
    batches = [
        trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        for batch in first_batches(trainer, n_batches)
    ]
    own = innermost(pl_module)
    if not batches:
        raise ValueError("The training loader has yielded no batch, on which blocks could be compared.")

    def loss(blocks: Sequence[Block]) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        for number, batch in enumerate(batches):
            with entries_restored(own), evaluating(own), without(network, blocks):
                vars(own)["log"] = vars(own)["log_dict"] = lambda *args, **kwargs: None
                with trainer.precision_plugin.train_step_context():
                    found = _loss_in(own.training_step(batch, number), own)
            total += torch.tensor([float(found), 1.0], dtype=torch.float64)
        total = all_reduce_sum(total.to(own.device)).cpu()
        return float(total[0] / total[1])

    return loss


def _loss_in(output: Any, module: LightningModule) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        raise ValueError(
            f"The training_step of {type(module).__name__} returned {type(output).__name__} and no loss, by which "
            f"blocks could be compared: use criterion='influence'."
        )
    return found.detach()
