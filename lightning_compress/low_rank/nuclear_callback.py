"""The nuclear norm as a callback: a fit that prepares a network for low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.core.distributed import broadcast
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.select import refuse_complex, select_parameters
from lightning_compress.low_rank.nuclear import WeightMatrix, weight_matrices
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.settings import settings_of


class NuclearNormCallback(CompressionCallback):
    """Trains under a penalty on the singular values of weights, so that low rank loses less in a later fit.

    R(W) = strength * sum of the singular values of W. No gradient is added; after an optimizer step
    W <- U max(S - lr * strength, 0) V^T, which makes small singular values exactly zero and keeps the shape. A
    convolution is the matrix with a row for each filter, in each of its groups. Here lr is the learning rate of the
    parameter's group in the optimizer, without the scaling by an optimizer's moments: over a fit the steps take at most
    strength * (sum of lr) from each singular value, by which strength can be chosen.

    `LowRankCallback` replaces layers before a fit begins. So train with this callback first, and with that one in
    the next fit of the module. `compress/rank_left` is logged once an epoch.

    Args:
        strength: Factor of the penalty, 0 or more; 0 changes nothing.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` reaches.
        exclude: Patterns to leave out.
        every_n_steps: After how many of its optimizer's steps a weight is decomposed; then the learning rates of all
            of them count. A decomposition of a large weight takes longer than a step.

    Raises:
        ValueError: An argument is out of range.

    References:
        Cai, Candes and Shen 2010, "A Singular Value Thresholding Algorithm for Matrix Completion", for the proximal
        step; Alvarez and Salzmann 2017, "Compression-aware Training of Deep Networks", for networks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NuclearNormCallback(0.5)], max_epochs=9, logger=False)
    """

    def __init__(
        self,
        strength: float,
        *,
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        every_n_steps: int = 10,
    ) -> None:
        strength = real_number(strength, "strength must be a finite number, 0 or more", least=0)
        super().__init__(**settings_of(locals()))
        whole_number(every_n_steps, "every_n_steps must be a whole number, 1 or more", least=1)
        self.strength = strength
        self.target = target
        self.exclude = exclude
        self.every_n_steps = every_n_steps
        self._begun = self._ended = False
        self._matrices: dict[str, WeightMatrix] = {}
        self._due: dict[str, list[float]] = {}  # by name: the steps since it was shrunk, and the sum of their rates
        self._left: dict[str, list[int]] = {}  # by name: singular values above zero when it was shrunk last, and all

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        if self.strength == 0:
            return Effects()
        names = select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude, warn=False)
        return Effects(values=dict.fromkeys(names, "rank"), proximal=True)

    def progress(self) -> Progress:
        acts = self.strength > 0
        numbers = {"rank_left": self.rank_left}
        return Progress(fraction=float(acts and self._begun), finished=self._ended or not acts, numbers=numbers)

    def rank_left(self) -> float:
        """Return the share of singular values that were above zero after the last proximal steps; 1 before any."""
        most = sum(all_of for _, all_of in self._left.values())
        return sum(left for left, _ in self._left.values()) / most if most else 1.0

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._begun, self._ended = True, False
        self._matrices = {}
        if self.strength > 0:
            self._matrices = weight_matrices(pl_module, target=self.patterns(pl_module), exclude=self.exclude)
        refuse_complex(pl_module, self._matrices, self.name)
        self._due, self._left = ({}, {}) if state is None else (dict(state["due"]), dict(state["left"]))

    def technique_state(self) -> dict[str, Any]:
        return {"due": self._due, "left": self._left}

    def project_copy(self, module: nn.Module) -> None:
        """Averages hold the values of the weights as they are."""

    def acts_on(self, optimizer: torch.optim.Optimizer) -> bool:
        if self.strength == 0:
            return False
        mine = {id(one.parameter) for one in self._matrices.values()}
        return any(id(one) in mine for group in optimizer.param_groups for one in group["params"])

    @torch.no_grad()
    def after_projection(self, optimizer: torch.optim.Optimizer) -> None:
        if self.strength == 0:
            return
        rates: dict[int, float] = {}
        for group in optimizer.param_groups:
            if "lr" not in group:
                raise ValueError(f"{self.name} needs a learning rate, and {type(optimizer).__name__} has no 'lr'.")
            rates |= {id(one): float(group["lr"]) for one in group["params"] if one.grad is not None}
        for name, matrix in self._matrices.items():
            if id(matrix.parameter) not in rates:
                continue  # it was not stepped
            steps, rate = self._due.pop(name, [0, 0.0])
            steps, rate = steps + 1, rate + rates[id(matrix.parameter)]
            if steps < self.every_n_steps:
                self._due[name] = [steps, rate]
                continue
            try:
                shrunk = matrix.shrunk(rate * self.strength)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise ValueError(
                    f"{self.name} can't decompose {name}, whose entries must be finite: {error}"
                ) from error
            if rate > 0:  # else the decomposition's rounding would change a weight that stays
                matrix.parameter.copy_(broadcast(shrunk.weight))  # a decomposition may differ between devices
            self._left[name] = [shrunk.left, shrunk.most]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
