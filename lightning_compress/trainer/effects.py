"""The effects of a technique on a network and its fit, and its progress, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.unwrap import LOGGED

Kind = Literal["zeros", "codebook", "grid", "signs", "bounds", "penalty", "rank", "scores"]
Sight = Literal["magnitudes", "gradients", "layers", "output", "second_backward"]
FEW_VALUES: tuple[Kind, ...] = ("codebook", "grid", "signs")
_SHOWN = 3  # settings in a message


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The effects of one technique in one fit. A technique that changes nothing, as at amount 0, has none.

    Attributes:
        values: The kind of values to which it sets parameters, by name: "zeros" (a mask), "codebook" (shared values),
            "grid" (a few bits), "signs", "bounds" (an interval), "penalty" (it pulls groups of entries to zero),
            "rank" (it pulls singular values to zero, and changes all entries for that), or "scores" (a mask of fixed
            weights, whose scores train in their place).
        span: The entries that share one codebook or scale: those of a "channel", of a "tensor", or of the whole
            "network".
        inputs: Layers whose inputs it quantizes, by name.
        modules: Names of the parameters that it trains in addition to the network's.
        proximal: Whether it changes values after the optimizer's step, instead of adding to their gradients.
        revives: Whether zeros may become other values again, because masked entries keep training latent values.
        rewinds: Whether it may restore the network of an earlier step.
        judges: Whether it does so by a metric of the fit's validations.
        takes_blocks: Whether it takes whole blocks out of the network during the fit, with their parameters.
        replaces_layers: Whether it has replaced layers by other modules before the optimizers were made.
        reads_structure: Whether it has given the network the structure of a file before the optimizers were made.
        shapes: When it changes shapes: "never", "on_fit_end", or "during_fit".
        looks_at: The basis of its decisions: the "magnitudes" of weights, their "gradients", the inputs or outputs of
            "layers" inside the forward pass, the "output" of the network in the user's step, or a "second_backward"
            pass from the loss.
        replays: How often it runs the user's step for each batch.
        runs_thinner: Whether it runs the network with fewer channels for that, and so knows which channels it has.
        chooses_by_sample: Whether the network runs parts of itself, such as blocks or channels, for some samples only.
        skips: Whether gates decide for each sample which blocks of the network run.
        begins: The optimizer step after which it acts for the first time; None if unknown. A callback also counts the
            steps of its earlier fits. `declared` counts as the Trainer does: a technique that began in an earlier fit
            has a step below 0.
        final: The optimizer step after which it makes no more decisions, counted likewise; None if unknown.
        options: The constructor argument that has an effect, by the effect's name, for messages:
            `{"revives": "regrow=True"}`.
    """

    values: Mapping[str, Kind] = field(default_factory=dict)
    span: Literal["channel", "tensor", "network"] = "tensor"
    inputs: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    proximal: bool = False
    revives: bool = False
    rewinds: bool = False
    judges: bool = False
    takes_blocks: bool = False
    replaces_layers: bool = False
    reads_structure: bool = False
    shapes: Literal["never", "on_fit_end", "during_fit"] = "never"
    looks_at: frozenset[Sight] = frozenset()
    replays: int = 1
    runs_thinner: bool = False
    chooses_by_sample: bool = False
    skips: bool = False
    begins: int | None = 0
    final: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def named(self, *kinds: Kind) -> set[str]:
        """Return the names of the parameters that it sets to values of these kinds."""
        return {name for name, kind in self.values.items() if kind in kinds}

    @property
    def changes_weights(self) -> bool:
        """Whether it changes weights or the inputs of layers."""
        return bool(self.values or self.inputs)


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A technique of a fit, with the effects that it declares.

    Attributes:
        name: The name of its class, or of its wrapper.
        settings: The arguments of its constructor.
        place: Its position in Trainer(callbacks=[...]), from 0.
        effects: Its effects in this fit.
    """

    name: str
    settings: Mapping[str, Any]
    place: int
    effects: Effects

    def label(self, *effects: str) -> str:
        """Return its name, with the constructor arguments that have these effects."""
        options = [self.effects.options[one] for one in effects if one in self.effects.options]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def label_next_to(self, other: Technique, *effects: str) -> str:
        """Return its label; for another technique of the same class, with the settings in which the two differ."""
        if other.name != self.name:
            return self.label(*effects)
        differing = [name for name in self.settings if self.settings[name] != other.settings.get(name)]
        shown = ", ".join(f"{name}={self.settings[name]!r}" for name in differing[:_SHOWN])
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a technique has come.

    Attributes:
        fraction: Share of its way, 0 to 1: 0 before it begins, and always where its settings change nothing.
        finished: Whether it decides nothing more, so that what follows is recovery. A technique with nothing to do is
            finished from the start; a penalty that lasts for the whole fit is finished at the end of the fit.
        ramp: Whether it comes to its end in events, after the last of which the network is tested before it recovers.
        numbers: Functions that compute what the technique logs, by name. The progress bar shows the first one.
    """

    fraction: float = 1.0
    finished: bool = True
    ramp: bool = False
    numbers: Mapping[str, Callable[[], float]] = field(default_factory=dict)


class DeclaresEffects:
    """A callback that declares the effects and the progress of a technique.

    Attributes:
        name: The name of its class, or of the wrapper that it belongs to.
        settings: The constructor arguments.
        replaces_early: Whether it replaces layers before the optimizers are made.
    """

    name: str
    settings: Mapping[str, Any]
    replaces_early: ClassVar[bool] = False

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        """Return the effects of the technique in the fit that starts.

        Args:
            trainer: The Trainer, whose optimizers and loaders exist. None before any fit: then steps are unknown.
            pl_module: The LightningModule.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply effects().")

    def declared(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        """Return its effects, with steps counted as by the Trainer, for `compatibility`."""
        return self.effects(trainer, pl_module)

    def outline(self, pl_module: LightningModule, inputs: Callable[[], ExampleInputs]) -> Outline | None:
        """Return what the technique would do, as a table; None for what its effects say of each parameter.

        Args:
            pl_module: The LightningModule, which is not changed.
            inputs: Reads example inputs of it.
        """
        return None

    def progress(self) -> Progress:
        """Return how far the technique has come."""
        return Progress()

    def logged_name(self, trainer: Trainer, name: str) -> str:
        """Return the name under which the technique logs one of its numbers."""
        return f"{LOGGED}{name}"
