"""Find averaged copies of the weights (EMA and the like), which must be projected as the weights are."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_modules(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the averaged copies that Lightning's callbacks hold; their parameters have the LightningModule's names."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            yield callback._average_model.module


def averages_inside(module: LightningModule) -> dict[str, str | None]:
    """Return the path of each `AveragedModel` in a LightningModule, with the path of the module that it averages.

    The latter is None where that module is outside the LightningModule, or one of several with the same shapes.
    """
    paths = [path for path, one in module.named_modules() if isinstance(one, AveragedModel)]
    followed: dict[str, str | None] = {}
    for path in paths:
        copy = module.get_submodule(f"{path}.module")
        alike = [
            other
            for other, one in module.named_modules()
            if not any(f"{other}.".startswith(f"{average}.") for average in paths)
            and type(one) is type(copy)
            and _shapes(one, without=paths, path=other) == _shapes(copy)
        ]
        trained = [one for one in alike if any(p.requires_grad for p in module.get_submodule(one).parameters())]
        candidates = trained or alike
        followed[path] = candidates[0] if len(candidates) == 1 else None
    return followed


def copies_inside(module: LightningModule) -> Iterator[nn.Module]:
    """Yield the averages that a LightningModule holds itself, with the parameter names of the averaged modules.

    Each yielded module contains only the averaged part.
    """
    for path, original in averages_inside(module).items():
        if original is not None:
            copy = module.get_submodule(f"{path}.module")
            for name in reversed(original.split(".") if original else []):
                parent = nn.Module()
                parent.add_module(name, copy)
                copy = parent
            yield copy


def _shapes(module: nn.Module, *, without: list[str] | tuple[()] = (), path: str = "") -> dict[str, tuple[int, ...]]:
    start = f"{path}." if path else ""
    return {
        name: tuple(one.shape)
        for name, one in module.named_parameters()
        if not any(f"{start}{name}".startswith(f"{average}.") for average in without)
    }
