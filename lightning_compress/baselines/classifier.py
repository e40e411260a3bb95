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
LRSchedule = Literal["cosine", "linear", "constant"]


def lr_factor(step: int, *, schedule: LRSchedule, steps: int, warmup: float = 0.0) -> float:
    """Return what the learning rate is multiplied by at optimizer step t.

    With T planned steps, of which W = `warmup` T rise: (t + 1) / (W + 1) for t < W, and from there on, with
    p = (t - W) / (T - W): (1 + cos(pi p)) / 2 for "cosine", 1 - p for "linear", 1 for "constant".

    Args:
        step: t, counted from 0; beyond the planned end its value holds.
        schedule: "cosine", "linear" or "constant".
        steps: T.
        warmup: Fraction of the planned steps that rise, 0 <= warmup < 1.

    Example:
        >>> [round(lr_factor(t, schedule="cosine", steps=4), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [lr_factor(t, schedule="linear", steps=10, warmup=0.3) for t in range(4)]
        [0.25, 0.5, 0.75, 1.0]
    """
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min((step - rising) / (steps - rising), 1.0)
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0 - progress if schedule == "linear" else 1.0


class MeanLoss(Metric):
    """The mean over all samples of all ranks, whatever the sizes of batches and ranks.

    Why not `self.log(..., sync_dist=True)`: it divides by the truncated mean of the ranks' sample counts. Why not
    torchmetrics' `MeanMetric`: it hides NaN, and after `Trainer.validate` it can't be updated in a fit.

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
        self.total = self.total + losses.sum()  # not in place: `validate` leaves inference tensors behind
        self.count = self.count + len(losses)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


class Classifier(LightningModule):
    """Train `network` with cross entropy and log its accuracy.

    The learning rate is `lr` times `lr_factor`, moved every optimizer step over the fit's planned steps.

    Logged: `train_loss` (of single steps, every `log_every_n_steps`), `val_loss`, `val_acc`, `test_loss`, `test_acc`.

    Args:
        network: Maps inputs to logits of shape (N, C), or to an object that has them as `.logits`.
        optimizer: "adam", "adamw" or "sgd".
        lr: Learning rate.
        weight_decay: As the optimizer understands it.
        momentum: Of "sgd"; the others have none to set.
        lr_schedule: "cosine", "linear" or "constant".
        warmup: Fraction of the planned steps over which the learning rate rises.
        label_smoothing: Of the training loss only.
        fused: Whether the optimizer updates all parameters in one kernel: faster for small networks, but Lightning
            refuses to clip gradients under mixed precision then.
        input_shape: Shape of one sample; makes the module's `example_input_array`, a batch of one.

    Raises:
        ValueError: Unknown optimizer or schedule, `warmup` outside 0 to 1, or a schedule for a fit without an end.

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
        if lr_schedule not in get_args(LRSchedule):
            raise ValueError(f"lr_schedule must be one of {', '.join(get_args(LRSchedule))}; got {lr_schedule!r}.")
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"warmup is the fraction of the steps that rise, 0 <= warmup < 1; got {warmup!r}.")
        if input_shape is not None:
            input_shape = list(input_shape)  # Hydra's own list type in the hparams would make the checkpoint unreadable
            self.example_input_array = torch.zeros(1, *input_shape)
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.label_smoothing = label_smoothing
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        # micro: the share of all samples that are right, which needs no number of classes
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
        # Only the steps that Lightning writes: logging every one adds a fifth to an epoch of LeNet-300-100.
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if interval and (self.global_step + 1) % interval == 0:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch in `val_loss` and `val_acc`."""
        self._evaluate(batch, self.val_loss, self.val_acc)
        self.log("val_loss", self.val_loss)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch in `test_loss` and `test_acc`."""
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
        """Return the optimizer and its schedule, which moves every step."""
        hparams = self.hparams
        kwargs = {"lr": hparams["lr"], "weight_decay": hparams["weight_decay"], "fused": hparams["fused"] or None}
        optimizer: torch.optim.Optimizer
        if hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), momentum=hparams["momentum"], **kwargs)
        else:
            optimizer = (torch.optim.Adam if hparams["optimizer"] == "adam" else torch.optim.AdamW)(
                self.parameters(), **kwargs
            )
        if hparams["lr_schedule"] == "constant" and hparams["warmup"] == 0.0:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        # The estimate has set the training loader up before Lightning restores a checkpoint's loops, and once set up it
        # would not get its state back: an epoch resumed in its middle would begin anew.
        self.trainer.fit_loop._combined_loader = None
        if math.isinf(steps):
            raise ValueError(
                f"lr_schedule={hparams['lr_schedule']!r} with warmup={hparams['warmup']} needs to know the fit's end:"
                " give Trainer(max_epochs=...) or Trainer(max_steps=...), or take lr_schedule='constant'."
            )
        factor = partial(lr_factor, schedule=hparams["lr_schedule"], steps=int(steps), warmup=hparams["warmup"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
