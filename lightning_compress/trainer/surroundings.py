"""The settings of a fit around a technique: strategy, precision, averages, compilation, optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from lightning_compress.trainer.inputs import is_compiled
from lightning_compress.trainer.unwrap import raw_optimizer

# Options of DistributedDataParallel with which all ranks have the same gradients and parameters after every step.
_DDP_OPTIONS = {
    "broadcast_buffers",
    "bucket_cap_mb",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "init_sync",
    "static_graph",
}


def check_namespace(trainer: Trainer, name: str) -> None:
    """Raise a TypeError for a Trainer that is not of `lightning.pytorch`; `name` is the name of the technique."""
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"{name} is a callback of `lightning.pytorch`, but the Trainer comes from {type(trainer).__module__}: "
            f"import Trainer and LightningModule from `lightning.pytorch`."
        )


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse a strategy that no technique supports; call this in `setup`, before the strategy shards the module.

    Args:
        trainer: The Trainer.
        name: The name of the technique, for messages.

    Raises:
        ValueError: The strategy, or an option of it, is not among those that are tested.
    """
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"{name} does not support {type(strategy).__name__}: use a single device, strategy='ddp' or "
            f"'ddp_find_unused_parameters_true'."
        )
    if isinstance(strategy, DDPStrategy):
        local = "LocalSGD" in type(strategy._ddp_comm_state).__name__
        if local or strategy._model_averaging_period is not None:
            raise ValueError(
                f"{name} needs equal weights on all ranks after every step, but with model_averaging_period or local "
                f"SGD they differ. Leave these options of DDPStrategy out."
            )
        if others := [option for option in strategy._ddp_kwargs if option not in _DDP_OPTIONS]:
            raise ValueError(
                f"{name} is not tested with DDPStrategy({others[0]}=...), only with "
                f"{', '.join(sorted(_DDP_OPTIONS))}: leave it out."
            )


class Surroundings:
    """The facts about a fit that the table of rules needs.

    Args:
        trainer: The Trainer, whose optimizers and loaders exist.
        pl_module: The LightningModule.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self.precision = str(trainer.precision)
        self.validates = bool(trainer.enable_validation)

    @cached_property
    def compiled(self) -> bool:
        """Whether torch.compile was applied to the module or to a part of it."""
        return is_compiled(self._module)

    # ------------------------------------------------------------------ strategy

    @property
    def _strategy(self) -> DDPStrategy | None:
        strategy = self._trainer.strategy
        return strategy if isinstance(strategy, DDPStrategy) else None

    @property
    def ddp(self) -> Mapping[str, Any]:
        """The options of DistributedDataParallel."""
        return {} if self._strategy is None else self._strategy._ddp_kwargs

    @property
    def comm_hook(self) -> str:
        """The name of DistributedDataParallel's communication hook, or ""."""
        return getattr(None if self._strategy is None else self._strategy._ddp_comm_hook, "__name__", "")

    @property
    def start_method(self) -> str:
        """The way in which processes are started: "popen", "spawn" or "fork"; "" for one device."""
        return "" if self._strategy is None else self._strategy._start_method

    @property
    def forks(self) -> bool:
        """Whether the main process gets the weights back by loading them into its unchanged module."""
        return self.start_method not in ("", "popen")

    # ------------------------------------------------------------------ averages

    @property
    def averages(self) -> list[str]:
        """The names of the callbacks that keep an average which this package can project."""
        return [type(one).__name__ for one in self._callbacks if isinstance(one, WeightAveraging)]

    @property
    def swaps_averages(self) -> bool:
        """Whether a callback replaces the weights by an average at the fit's end."""
        return any(isinstance(one, StochasticWeightAveraging) for one in self._callbacks)

    def average_after(self, place: int) -> str:
        """Return the name of an averaging callback at or after a position in the list of callbacks, or ""."""
        return next((type(one).__name__ for one in self._callbacks[place:] if isinstance(one, WeightAveraging)), "")

    # ------------------------------------------------------------------ optimizers

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [raw_optimizer(one) for one in self._trainer.optimizers]

    @property
    def lbfgs(self) -> bool:
        """Whether one of the optimizers is LBFGS."""
        return any(isinstance(one, torch.optim.LBFGS) for one in self._optimizers)

    @property
    def schedule_free(self) -> str:
        """The name of an optimizer that exchanges the weights in its methods `train` and `eval`, or ""."""
        swapping = (one for one in self._optimizers if callable(getattr(one, "train", None)))
        return next((type(one).__name__ for one in swapping if callable(getattr(one, "eval", None))), "")

    @property
    def unhookable(self) -> str:
        """The name of an optimizer without step hooks, or ""."""
        names = (type(one).__name__ for one in self._optimizers if not hasattr(one, "_optimizer_step_post_hooks"))
        return next(names, "")

    @property
    def fused(self) -> str:
        """The name of an optimizer that unscales gradients inside its step, or ""."""
        names = (type(one).__name__ for one in self._optimizers if getattr(one, "_step_supports_amp_scaling", False))
        return next(names, "")

    @cached_property
    def float16_weight(self) -> str:
        """The name of a parameter that an optimizer trains in float16, or ""."""
        trained = set().union(*self._stepped())
        names = (n for n, p in self._module.named_parameters() if p.dtype == torch.float16 and id(p) in trained)
        return next(names, "")

    def trained_apart(self, names: Sequence[str]) -> str:
        """Return a name whose parameter is not trained by the optimizer that trains the first one, or ""."""
        parameters = dict(self._module.named_parameters())
        first = next((ids for ids in self._stepped() if any(id(parameters[name]) in ids for name in names)), set())
        apart = (n for n in names if id(parameters[n]) not in first or not parameters[n].requires_grad)
        return next(apart, "")

    def _stepped(self) -> Iterator[set[int]]:
        for optimizer in self._optimizers:
            yield {id(one) for group in optimizer.param_groups for one in group["params"]}
