"""Base class of the callbacks with a `target`: `target=None` is resolved once, when the fit begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.core.select import check_computed, exact_patterns
from lightning_compress.trainer.resume import ResumableCallback
from lightning_compress.trainer.targets import Layers, begun_to_train, described, layers_of_fit


class TargetingCallback(ResumableCallback):
    """A technique for the parameters that patterns name, or for the layers that the fit trains.

    A subclass sets the attributes.

    Attributes:
        target: Patterns of the parameters to take; None: the layers that the fit trains.
        exclude: Patterns of the parameters to leave out.
        network: Dotted path of the submodule that makes the prediction, or "" for the module's own forward.
        follows_averages: Whether averages in the module are changed along with the modules that they average.
        needs_gradients: Whether the technique can't take layers that are frozen when the fit begins.
    """

    target: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    network: str = ""
    needs_gradients: bool = False
    follows_averages: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._default: dict[str, list[str]] | None = (
            None  # for target=None: names of weights "taken", and of those "untrained" at the fit's start
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._fitted is None:
            self._default = None  # left by a fit that was refused

    def patterns(self, pl_module: LightningModule, *, named: bool = False) -> str | Sequence[str] | None:
        """Return the patterns that `target` stands for in this fit; None outside of a fit.

        Args:
            pl_module: The LightningModule.
            named: Whether another argument names the layers, so that an empty result is allowed.

        Raises:
            ValueError: `target` is None, and the fit trains no layer that the network uses.
        """
        if self.target is not None:
            return self.target
        trainer = pl_module._trainer
        if self._default is None:
            if trainer is None or trainer.state.fn != "fit":
                return None
            layers = layers_of_fit(trainer, pl_module, self.network, frozen=not self.needs_gradients)
            if named:
                return exact_patterns(layers.taken)
            self._default = self._decide_default(pl_module, layers)
        check_computed(pl_module, self._default["taken"], self.exclude)
        return exact_patterns(self._default["taken"])

    def _decide_default(self, pl_module: LightningModule, layers: Layers) -> dict[str, list[str]]:
        said = described(pl_module, layers, follows=self.follows_averages)
        if not layers.taken:
            raise ValueError(
                f"{self.name} with target=None selects no parameter of {type(pl_module).__name__}: no optimizer of "
                f"this fit trains a linear layer or convolution with entries. Name the layers by target=."
            )
        if said:
            rank_zero_info(f"{self.name}: {said}")
        return {"taken": layers.taken, "untrained": layers.untrained}

    def _say_what_trains_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once of layers that were left out because nothing trained them, but that train now."""
        if self._default is None or not self._default["untrained"]:
            return
        found = begun_to_train(trainer, pl_module, self._default["untrained"])
        if found:
            self._default["untrained"] = [name for name in self._default["untrained"] if name not in found]
            rank_zero_warn(
                f"{self.name} leaves {', '.join(found)} as they are, because no optimizer trained them when the fit "
                f"began; now an optimizer does. Name them by target= to take them from the start."
            )

    # ------------------------------------------------------------------ checkpoints: a resume keeps the layers

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._default is not None:
            checkpoint["callbacks"][self.state_key]["default"] = self._default

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        mine = checkpoint["callbacks"].get(self.state_key, {}) if "callbacks" in checkpoint else {}
        self._default = mine.get("default", self._default)
