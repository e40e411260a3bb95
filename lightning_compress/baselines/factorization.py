"""Networks that predict ratings, and the LightningModule that trains them: NNMF and the dot product."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_compress.baselines.classifier import LRSchedule, MeanLoss, check_schedule, with_schedule
from lightning_compress.baselines.ratings import Ratings
from lightning_compress.core.distributed import world_size

RatingOptimizer = Literal["rmsprop", "adam"]


class Factorization(nn.Module):
    """Base class of networks with tables of latent vectors: modules named user... and item..., which map indices.

    Args:
        users: The number of users.
        items: The number of items.
    """

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        for name, number in (("users", users), ("items", items)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(
                    f"{name} of {type(self).__name__} is the number of {name} that the data have; got {number!r}."
                )
        self.users, self.items = users, items

    def add_table(self, side: Literal["user", "item"], suffix: str, width: int, *, std: float) -> None:
        """Add a table of latent vectors, drawn from a normal distribution that is cut off at twice its `std`."""
        table = nn.Embedding(self.users if side == "user" else self.items, width)
        nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)
        self.add_module(side + suffix, table)

    def tables(self, side: Literal["user", "item"]) -> dict[str, nn.Module]:
        """Return the tables of the users or of the items, by name."""
        return {name: child for name, child in self.named_children() if name.startswith(side)}

    def is_latent(self, name: str) -> bool:
        """Whether a parameter belongs to a table, by its name."""
        return name.startswith(("user", "item"))


class NNMF(Factorization):
    """Neural network matrix factorization (Dziugaite and Roy 2015, 1511.06443): a perceptron instead of a product.

    A rating is f(U, V, U' * V'): a perceptron f on the vectors U of the user and V of the item, `width` numbers each,
    and `products` inner products of two vectors of `factors` numbers. The paper has width 10, 60 products of single
    numbers, and three or four hidden layers of 50 sigmoid units.

    Args:
        users: The number of users.
        items: The number of items.
        width: The size D of the vectors that the perceptron sees.
        products: The number D' of inner products that it sees.
        factors: The number K of entries over which each inner product sums.
        hidden: The sizes of the hidden layers.

    Shapes:
        input (N, 2), indices of a user and an item; output (N,).

    Example:
        >>> NNMF(943, 1682)(torch.tensor([[0, 1], [942, 1681]])).shape
        torch.Size([2])
    """

    user: nn.Module
    item: nn.Module
    user_products: nn.Module
    item_products: nn.Module

    def __init__(
        self,
        users: int,
        items: int,
        *,
        width: int = 10,
        products: int = 60,
        factors: int = 1,
        hidden: Sequence[int] = (50, 50, 50),
    ) -> None:
        super().__init__(users, items)
        if width < 0 or products < 0 or factors < 1 or width + products == 0 or not hidden or min(hidden) < 1:
            raise ValueError(
                "NNMF needs a width or products, 0 or more of each, factors of at least 1, and hidden layers of one"
                f" unit or more; got width={width}, products={products}, factors={factors}, hidden={list(hidden)}."
            )
        self.factors = factors
        for side in ("user", "item"):
            if width:
                self.add_table(side, "", width, std=0.1)
            if products:
                self.add_table(side, "_products", products * factors, std=0.1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (inputs, outputs) in enumerate(pairwise([2 * width + products, *hidden, 1]), start=1):
            layers[f"fc{number}"] = linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight, gain=4.0)  # Glorot and Bengio's bound for sigmoid units
            nn.init.zeros_(linear.bias)
            if number <= len(hidden):
                layers[f"sigmoid{number}"] = nn.Sigmoid()
        self.mlp = nn.Sequential(layers)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        seen = [self.user(user), self.item(item)] if hasattr(self, "user") else []
        if hasattr(self, "user_products"):
            products = self.user_products(user) * self.item_products(item)
            seen.append(products if self.factors == 1 else products.unflatten(1, (-1, self.factors)).sum(2))
        ratings: Tensor = self.mlp(torch.cat(seen, 1)).squeeze(1)
        return ratings


class DotProduct(Factorization):
    """Linear matrix factorization: the inner product of two vectors, and biases of the user and of the item.

    Args:
        users: The number of users.
        items: The number of items.
        width: The size of the vectors.
        biases: Whether there are biases.

    Shapes:
        input (N, 2), indices of a user and an item; output (N,).

    Example:
        >>> DotProduct(943, 1682, width=32)(torch.tensor([[0, 1], [942, 1681]])).shape
        torch.Size([2])
    """

    user: nn.Module
    item: nn.Module
    user_bias: nn.Module
    item_bias: nn.Module

    def __init__(self, users: int, items: int, *, width: int = 16, biases: bool = True) -> None:
        super().__init__(users, items)
        if width < 1:
            raise ValueError(f"width of DotProduct is the size of the vectors, at least 1; got {width!r}.")
        for side in ("user", "item"):
            self.add_table(side, "", width, std=0.1)
            if biases:
                self.add_table(side, "_bias", 1, std=0.001)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        ratings: Tensor = (self.user(user) * self.item(item)).sum(1)
        if hasattr(self, "user_bias"):
            ratings = ratings + (self.user_bias(user) + self.item_bias(item)).squeeze(1)
        return ratings


class RootMeanSquare(MeanLoss):
    """The root mean square of errors of all samples of all ranks; `update` takes the squared errors, of shape (N,).

    Example:
        >>> metric = RootMeanSquare()
        >>> metric.update(torch.tensor([9.0, 16.0, 11.0]))
        >>> metric.compute()
        tensor(3.4641)
    """

    def compute(self) -> Tensor:
        """Return the root of the mean."""
        return super().compute().sqrt()


class RatingModule(LightningModule):
    """Predicts ratings, with what training they have left to a subclass; logs `val_rmse` and `test_rmse`."""

    def __init__(self) -> None:
        super().__init__()
        self.val_rmse, self.test_rmse = RootMeanSquare(), RootMeanSquare()

    def sizes(self) -> tuple[int, int]:
        """Return the numbers of users and of items that it knows."""
        raise NotImplementedError(f"{type(self).__name__} must supply sizes().")

    def setup(self, stage: str) -> None:
        """Check that it knows all users and items of the data, if these are `Ratings`."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Ratings):
            return
        for name, known, number in zip(("users", "items"), self.sizes(), (data.users, data.items), strict=True):
            if number is not None and number > known:
                raise ValueError(
                    f"The data have {number:,} {name}, and {type(self).__name__} was made for {known:,}: make it with "
                    f"users={data.users} and items={data.items}."
                )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to `val_rmse`."""
        self.val_rmse.update((self(batch[0]) - batch[1]).square())
        self.log("val_rmse", self.val_rmse, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to `test_rmse`."""
        self.test_rmse.update((self(batch[0]) - batch[1]).square())
        self.log("test_rmse", self.test_rmse)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's predictions."""
        ratings: Tensor = self(batch[0])
        return ratings


class MatrixFactorization(RatingModule):
    """Trains a `Factorization` on the squared error of ratings, its latent vectors and its other weights in turns.

    The loss of N ratings r is (sum of (r - f)^2 + `regularization` * sum of c |u|^2) / N over all latent vectors u,
    with c = 1, or, with `frequency_scaled`, c = the number of ratings that u has. With c = 1 the second sum counts
    1 / (B R) where there are B batches on each of R ranks.

    With `alternate`, optimizer steps 0, 2, 4, ... train all weights that are not latent, and steps 1, 3, ... the latent
    vectors. There is one optimizer, and the parameters whose turn it is not have no gradient, so it leaves them and
    their statistics as they are: that equals two optimizers that step in turns. But there is one step per batch, with
    one backward pass, as the callbacks that project weights around a step, schedules, accumulation, gradient clipping
    and DDP expect it.

    Args:
        network: A `Factorization`.
        optimizer: "rmsprop" (the paper's) or "adam".
        lr: The learning rate.
        lr_schedule: "cosine", "linear", "step" or "constant", over the planned steps of the fit.
        warmup: The fraction of the planned steps over which the learning rate rises.
        regularization: The weight of the penalty; the paper has 50 for the 100,000 ratings of MovieLens 100K.
        frequency_scaled: Whether the penalty of a vector counts once per rating.
        alternate: Whether latent vectors and other weights train in turns.

    Raises:
        ValueError: An argument is unknown or out of range, or `alternate` is asked of a network with latent vectors
            only.

    Example:
        >>> module = MatrixFactorization(NNMF(943, 1682), regularization=50.0)
        >>> module(torch.tensor([[0, 1]])).shape
        torch.Size([1])
    """

    def __init__(
        self,
        network: Factorization,
        *,
        optimizer: RatingOptimizer = "rmsprop",
        lr: float = 1e-3,
        lr_schedule: LRSchedule = "constant",
        warmup: float = 0.0,
        regularization: float = 0.0,
        frequency_scaled: bool = False,
        alternate: bool = True,
    ) -> None:
        super().__init__()
        if optimizer not in get_args(RatingOptimizer):
            raise ValueError(f"optimizer must be one of {', '.join(get_args(RatingOptimizer))}; got {optimizer!r}.")
        check_schedule(lr_schedule, warmup)
        if not regularization >= 0:
            raise ValueError(f"regularization is the weight of a penalty, 0 or more; got {regularization!r}.")
        if alternate and all(network.is_latent(name) for name, _ in network.named_parameters()):
            raise ValueError(
                f"alternate=True trains latent vectors and other weights in turns, and {type(network).__name__} has "
                "latent vectors only: set alternate=False."
            )
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.regularization, self.frequency_scaled, self.alternate = regularization, frequency_scaled, alternate

    def sizes(self) -> tuple[int, int]:
        """Return the numbers of users and of items that it knows."""
        return self.network.users, self.network.items

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the ratings, of shape (N,), of pairs (user, item), of shape (N, 2)."""
        ratings: Tensor = self.network(pairs)
        return ratings

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        pairs, ratings = batch
        loss: Tensor = (self(pairs) - ratings).square().mean()
        if self.regularization:
            loss = loss + self.regularization * self.penalty(pairs)
        self.log("train_loss", loss)
        return loss

    def penalty(self, pairs: Tensor) -> Tensor:
        """Return the penalty of a batch per rating, before it is weighted."""
        batches = 1 if self.frequency_scaled else self.trainer.num_training_batches
        if batches == math.inf:
            raise ValueError(
                "The penalty of an epoch is divided among its batches, and the training loader has no length: use a "
                "loader with a length, or frequency_scaled=True, or regularization=0."
            )
        parts = 1 if self.frequency_scaled else world_size() * int(batches)
        sums = []
        for column, side, number in ((0, "user", self.network.users), (1, "item", self.network.items)):
            everyone = torch.arange(number, device=pairs.device)
            squares = [table(everyone).square().sum(1) for table in self.network.tables(side).values()]  # type: ignore[arg-type]  # a literal
            total = torch.stack(squares).sum(0)
            counts = pairs[:, column].bincount(minlength=number) if self.frequency_scaled else torch.ones_like(total)
            sums.append((counts * total).sum())
        return torch.stack(sums).sum() / (len(pairs) * parts)

    def on_after_backward(self) -> None:
        """Leave the parameters whose turn it is not without a gradient."""
        if self.alternate:
            latent = self.global_step % 2 == 1
            for name, parameter in self.network.named_parameters():
                if self.network.is_latent(name) != latent:
                    parameter.grad = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its learning-rate schedule."""
        kind = torch.optim.RMSprop if self.hparams["optimizer"] == "rmsprop" else torch.optim.Adam
        optimizer = kind(self.parameters(), lr=self.hparams["lr"])
        return with_schedule(optimizer, self, schedule=self.hparams["lr_schedule"], warmup=self.hparams["warmup"])
