"""The LightningModule that trains any network of this project as a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

OptimizerName = Literal["adam", "adamw", "sgd"]
LRSchedule = Literal["cosine", "linear", "step", "constant"]


def lr_factor(step: int, *, schedule: LRSchedule, steps: int, warmup: float = 0.0) -> float:
    """Return the factor of the learning rate at optimizer step t.

    During the first W = `warmup` T of T planned steps the factor rises: (t + 1) / (W + 1). After them, with
    p = (t - W) / (T - W), it is (1 + cos(pi p)) / 2 for "cosine", 1 - p for "linear", 1 for "constant", and for "step"
    1, from p = 1/2 on 0.1, and from p = 3/4 on 0.01.

    Args:
        step: The step t, counted from 0. After the planned end the factor stays at its last value.
        schedule: "cosine", "linear", "step" or "constant".
        steps: The number T of planned steps.
        warmup: The fraction of the planned steps over which the factor rises, 0 <= warmup < 1.

    Example:
        >>> [round(lr_factor(t, schedule="cosine", steps=4), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [lr_factor(t, schedule="linear", steps=10, warmup=0.3) for t in range(4)]
        [0.25, 0.5, 0.75, 1.0]
        >>> [lr_factor(t, schedule="step", steps=4) for t in range(5)]
        [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min((step - rising) / (steps - rising), 1.0)
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0 - progress if schedule == "linear" else 1.0


def check_schedule(schedule: str, warmup: float) -> None:
    """Raise a ValueError for a schedule of the learning rate that `lr_factor` does not know."""
    if schedule not in get_args(LRSchedule):
        raise ValueError(f"lr_schedule must be one of {', '.join(get_args(LRSchedule))}; got {schedule!r}.")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(
            f"warmup is the fraction of steps over which the learning rate rises, 0 <= warmup < 1; got {warmup!r}."
        )


def with_schedule(
    optimizer: torch.optim.Optimizer, module: LightningModule, *, schedule: LRSchedule, warmup: float
) -> OptimizerLRScheduler:
    """Return what `configure_optimizers` returns: an optimizer whose learning rate follows `lr_factor`, step by step.

    Raises:
        ValueError: The learning rate has a schedule but the fit has no planned end.
    """
    if schedule == "constant" and warmup == 0.0:
        return optimizer
    trainer = module.trainer
    steps = trainer.estimated_stepping_batches
    # The estimate sets up the training loader, before Lightning restores a checkpoint's loops. Lightning would then not
    # restore the loader's state, so an epoch that is resumed in its middle would start from its beginning.
    trainer.fit_loop._combined_loader = None
    if math.isinf(steps):
        raise ValueError(
            f"lr_schedule={schedule!r} with warmup={warmup} needs a fit with a planned end: give"
            " Trainer(max_epochs=...) or Trainer(max_steps=...), or use lr_schedule='constant'."
        )
    factor = partial(lr_factor, schedule=schedule, steps=int(steps), warmup=warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MeanLoss(Metric):
    """The mean loss over all samples of all ranks; batches and ranks may have different sizes.

    `self.log(..., sync_dist=True)` would divide by the truncated mean of the ranks' sample counts. torchmetrics'
    `MeanMetric` hides NaN, and can't be updated in a fit after `Trainer.validate`.

    Example:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([6.0]))
        >>> metric.compute()
        tensor(3.)
    """

    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Add the losses of a batch, of shape (N,)."""
        self.total = self.total + losses.sum()  # not in place, because after `validate` it is an inference tensor
        self.count = self.count + len(losses)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


class Classifier(LightningModule):
    """Trains a network with cross entropy, and logs its loss and accuracy.

    The learning rate at each optimizer step is `lr` times `lr_factor`, over the planned steps of the fit. The module
    logs `train_loss` (of single steps, every `log_every_n_steps`), `val_loss`, `val_acc`, `test_loss` and `test_acc`.

    Args:
        network: A module that maps inputs to logits of shape (N, C), or to an object with the attribute `logits`.
        optimizer: "adam", "adamw" or "sgd".
        lr: The learning rate.
        weight_decay: The weight decay of the optimizer.
        momentum: The momentum of "sgd"; the other optimizers ignore it.
        lr_schedule: "cosine", "linear", "step" or "constant", as in `lr_factor`.
        warmup: The fraction of the planned steps over which the learning rate rises.
        label_smoothing: The label smoothing of the training loss; validation and test losses have none.
        fused: Whether the optimizer updates all parameters in one kernel. This is faster for small networks, but
            Lightning then refuses to clip gradients with mixed precision.
        input_shape: The shape of one sample. The module's `example_input_array` is then a batch of one.

    Raises:
        ValueError: `optimizer` or `lr_schedule` is unknown, `warmup` is not in [0, 1), or the learning rate has a
            schedule but the fit has no planned end.

    Example:
        >>> module = Classifier(nn.Linear(4, 3), optimizer="sgd", lr=0.1, input_shape=(4,))
        >>> module(module.example_input_array).shape
        torch.Size([1, 3])
        >>> "network" in module.hparams
        False
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerName = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        lr_schedule: LRSchedule = "cosine",
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
        fused: bool = False,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}; got {optimizer!r}.")
        check_schedule(lr_schedule, warmup)
        if input_shape is not None:
            input_shape = list(input_shape)  # with Hydra's list type in its hparams a checkpoint would be unreadable
            self.example_input_array = torch.zeros(1, *input_shape)
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.label_smoothing = label_smoothing
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        # "micro" is the fraction of correct samples and needs no number of classes.
        self.val_acc = MulticlassAccuracy(average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(average="micro", validate_args=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, of shape (N, C)."""
        output = self.network(inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs), targets, label_smoothing=self.label_smoothing)
        # Lightning writes only these steps; logging all of them makes an epoch of LeNet-300-100 a fifth longer.
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if interval and (self.global_step + 1) % interval == 0:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to `val_loss` and `val_acc`."""
        self._evaluate(batch, self.val_loss, self.val_acc)
        self.log("val_loss", self.val_loss)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to `test_loss` and `test_acc`."""
        self._evaluate(batch, self.test_loss, self.test_acc)
        self.log("test_loss", self.test_loss)
        self.log("test_acc", self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's logits."""
        logits: Tensor = self(batch[0])
        return logits

    def _evaluate(self, batch: tuple[Tensor, Tensor], loss: MeanLoss, accuracy: MulticlassAccuracy) -> None:
        inputs, targets = batch
        logits = self(inputs)
        loss.update(F.cross_entropy(logits, targets, reduction="none"))
        accuracy.update(logits, targets)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its learning-rate schedule, which advances at every optimizer step."""
        hparams = self.hparams
        kwargs = {"lr": hparams["lr"], "weight_decay": hparams["weight_decay"], "fused": hparams["fused"] or None}
        optimizer: torch.optim.Optimizer
        if hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), momentum=hparams["momentum"], **kwargs)
        else:
            optimizer = (torch.optim.Adam if hparams["optimizer"] == "adam" else torch.optim.AdamW)(
                self.parameters(), **kwargs
            )
        return with_schedule(optimizer, self, schedule=hparams["lr_schedule"], warmup=hparams["warmup"])
