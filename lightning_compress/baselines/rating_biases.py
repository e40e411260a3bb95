"""The baseline that other predictions of ratings must beat: a bias for each user and each item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.baselines.factorization import RatingModule
from lightning_compress.core.distributed import all_reduce_sum


class RidgeBiases(RatingModule):
    """Predicts a rating by a bias of its user and a bias of its item: the baseline that others must beat.

    The biases minimise sum of (r - b_u - c_v)^2 + regularization * (sum of b_u^2 + sum of c_v^2). Each epoch solves for
    those of one side in closed form, given those of the other: c_v = sum of (r - b_u) / (number of ratings + the
    regularization), and so on in turns, items first. That is done for several regularizations side by side, and after
    each validation the module takes over the biases that do best there; without a validation part, the first ones.

    Args:
        users: The number of users.
        items: The number of items.
        regularization: What to choose from, 0 or more each. With infinity alone all biases are zero, and every
            prediction is the mean of the training ratings.

    Raises:
        ValueError: There is no regularization, or one below zero.

    Example:
        >>> RidgeBiases(943, 1682, regularization=[1.0, 2.0, 5.0])(torch.tensor([[0, 1]]))
        tensor([0.], grad_fn=<AddBackward0>)
    """

    def __init__(self, users: int, items: int, *, regularization: Sequence[float] = (1.0, 2.0, 3.0, 5.0, 10.0)) -> None:
        super().__init__()
        if (
            not isinstance(regularization, Sequence)
            or not regularization
            or not all(one >= 0 for one in regularization)
        ):
            raise ValueError(
                f"regularization of RidgeBiases is a list of numbers to choose from, 0 or more; got {regularization!r}."
            )
        self.regularization = [float(one) for one in regularization]
        self.automatic_optimization = False
        # Parameters, because DDP wants some, though no gradient trains them
        self.user, self.item = nn.Parameter(torch.zeros(users)), nn.Parameter(torch.zeros(items))
        tried = len(self.regularization)
        self._solved = [torch.zeros(tried, users), torch.zeros(tried, items)]  # biases for each regularization
        self._sums = [torch.zeros(0), torch.zeros(0)]  # of an epoch: ratings without the other bias, and their number
        self._errors = torch.zeros(tried)  # sums of squares of a validation
        self._best = 0  # the place of the regularization that did best

    def sizes(self) -> tuple[int, int]:
        """Return the numbers of users and of items that it knows."""
        return len(self.user), len(self.item)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the ratings, of shape (N,), of pairs (user, item), of shape (N, 2)."""
        ratings: Tensor = self.user[pairs[:, 0]] + self.item[pairs[:, 1]]
        return ratings

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that changes nothing: its steps, one for each epoch, let `ModelCheckpoint` save."""
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_fit_start(self) -> None:
        """Move the biases to the module's device."""
        self._solved = [one.to(self.device) for one in self._solved]

    def on_train_epoch_start(self) -> None:
        """Begin new sums."""
        side = self._solved[self._side]
        self._sums = [torch.zeros_like(side), side.new_zeros(side.shape[1])]

    @property
    def _side(self) -> int:
        return (self.current_epoch + 1) % 2  # items first

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to the sums of the epoch."""
        pairs, ratings = batch
        own, other, ratings = pairs[:, self._side], pairs[:, 1 - self._side], ratings.to(self._solved[0].dtype)
        self._sums[0].index_add_(1, own, ratings - self._solved[1 - self._side][:, other])
        self._sums[1].index_add_(0, own, torch.ones_like(ratings))
        if self.trainer.is_last_batch:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.step()  # without gradients

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Solve for the biases of one side when the epoch's batches are over, before they are validated."""
        if self.trainer.is_last_batch:
            sums, counts = (all_reduce_sum(one) for one in self._sums)
            strength = sums.new_tensor(self.regularization)[:, None]
            self._solved[self._side] = torch.where(counts > 0, sums / (counts + strength), 0.0)
            self._take(self._best)

    def on_validation_epoch_start(self) -> None:
        """Begin a new comparison."""
        self._errors = torch.zeros_like(self._errors, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to the comparison, and to `val_rmse` of the biases that the module has now."""
        super().validation_step(batch, batch_idx)
        pairs, ratings = batch
        user, item = (one[:, pairs[:, side]] for side, one in enumerate(self._solved))
        self._errors = self._errors + (user + item - ratings).square().sum(1)

    def on_validation_epoch_end(self) -> None:
        """Take over the biases that did best."""
        if self.trainer.state.fn == "fit":
            self._best = int(all_reduce_sum(self._errors).argmin())
            self._take(self._best)

    @torch.no_grad()
    def _take(self, place: int) -> None:
        self.user.copy_(self._solved[0][place])
        self.item.copy_(self._solved[1][place])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the biases for every regularization."""
        checkpoint["ridge_biases"] = {"solved": self._solved, "best": self._best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load them."""
        saved = checkpoint["ridge_biases"]
        self._solved, self._best = list(saved["solved"]), saved["best"]
