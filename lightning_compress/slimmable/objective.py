"""The objective of widths: the user's own step with the full network, and again with the network of each width.

loss = v_1 e_1 + sum over w < 1 of v_w [(1 - a) e_w + a T^2 KL(softmax(z_1 / T) || softmax(z_w / T))]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.answering import answering
from lightning_compress.core.distributed import gather, rank
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.given import flag
from lightning_compress.core.recalibrate import recalibrate
from lightning_compress.core.undo import as_before_on_error
from lightning_compress.slimmable.norms import Norms, WidthNorms, give_norms, norms_of, sliced_norms
from lightning_compress.slimmable.one_step import WidthsStep, inputs_of
from lightning_compress.slimmable.order import Order, sort_channels
from lightning_compress.slimmable.record import note_widths
from lightning_compress.slimmable.switch import find_groups, thin_of, width_of
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.slimmable.widths import Width, checked_widths, counts_at, shrinkable
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.one_step import OneStep, backbone
from lightning_compress.trainer.replaying import ReplayingObjective
from lightning_compress.trainer.surroundings import Surroundings
from lightning_compress.trainer.unwrap import innermost, parameters_of

RANDOM = 2  # widths that are drawn for a step of universal training, beside the widest and the narrowest
_STEPS = 32  # random widths are multiples of 1 / 32, so that each has its thin network soon
_BATCHES = 5  # whose inputs are kept to compute the statistics of norms anew
_SAMPLES = 64  # of each of these batches


class Widths(ReplayingObjective):
    """The objective that `SlimmableWidth` adds; its arguments are that wrapper's.

    Attributes:
        collecting: Called in evaluation with what the network was called with; steps are not replayed then.
    """

    runs_thinner: ClassVar[bool] = True

    def __init__(self, widths: Sequence[float] | None, *, example_inputs: Any, **settings: Any) -> None:
        self.widths = None if widths is None else checked_widths(widths)
        for name in ("universal", "allow_inexact"):
            flag(settings[name], name)
        universal = settings["universal"]
        distill = settings["distill"]
        known = {"distill": (1.0 if universal else 0.5) if distill is None else distill}
        if universal and settings["weights"] not in (None, "equal"):
            raise ValueError(
                f"universal=True draws widths at random, which count alike, so that weights={settings['weights']!r} is "
                f"for a list of widths: leave weights= or universal= out."
            )
        if settings["weights"] is None:
            known["weights"] = "equal" if universal else "rising"
        if callable(settings["order"]):
            known["order"] = getattr(settings["order"], "__name__", "own")  # a checkpoint is recognised by it
        super().__init__(widths=None if self.widths is None else list(self.widths), **(settings | known))
        self.example_inputs: ExampleInputs | None = example_inputs
        self.universal = universal
        self.norms: Norms = settings["norms"] or ("recalibrate" if universal else "private")
        self.order: Order = settings["order"]
        self.allow_inexact: bool = settings["allow_inexact"]
        self.collecting: Callable[[ExampleInputs], None] | None = None
        self._everywhere: list[list[ExampleInputs]] | None = None  # `_kept` of all ranks, while a checkpoint is made
        self._generator = torch.Generator()
        self._drawn: list[float] = []  # the random widths of this step
        self._kept: list[ExampleInputs] = []  # inputs of the last batches
        self._others: dict[float, ThinNetwork] = {}  # of widths that were drawn
        self._stale = False  # whether training went on since the statistics were computed
        if self.norms not in get_args(Norms):
            raise ValueError(f"norms is one of {', '.join(get_args(Norms))}; got {self.norms!r}.")
        if self.universal and self.norms != "recalibrate":
            raise ValueError(
                f"universal=True trains widths that have no norms of their own, so that norms={self.norms!r} is for a "
                f"list of widths: leave norms= or universal= out."
            )

    # ------------------------------------------------------------------ widths

    def held(self, module: LightningModule) -> WidthNorms | None:
        """Return what the module's network holds for its widths; None before it has some."""
        return norms_of(backbone(resolve_network(module, self.network)))

    def thinner(self, module: LightningModule) -> list[float]:
        """Return the widths below 1.0 that the network has, if it can run at them."""
        held = self.held(module)
        return [] if held is None or held.groups is None else list(held.widths[:-1])

    def adopt(self, network: nn.Module) -> bool:
        """Take the widths that a network has already; return whether it has some.

        Raises:
            ValueError: They are others than `widths` says.
        """
        held = norms_of(backbone(network))
        if held is None:
            return False
        if self.widths is not None and self.widths != held.widths:
            raise ValueError(
                f"The network has the widths {', '.join(map(str, held.widths))} already, and widths= says "
                f"{', '.join(map(str, self.widths))}: pass widths=None to go on with those."
            )
        if self.settings["norms"] is None and not self.universal:
            self.norms = held.norms
        if self.norms != held.norms:
            raise ValueError(
                f"The network was trained with norms={held.norms!r}, and this wrapper has norms={self.norms!r}."
            )
        note_widths(backbone(network))
        return True

    def build(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Give a network its widths, or find anew the channels of one that has them.

        Args:
            network: The network, or its compiled form.
            inputs: What it is called with.

        Raises:
            ValueError: None of its channels can leave, or two widths keep the same; the network stays as it was.
        """
        bare = backbone(network)
        if norms_of(bare) is not None:
            find_groups(bare, inputs)
        elif self.widths is not None and len(self.widths) > 1:
            groups = channel_groups(bare, inputs)
            found = shrinkable(bare, groups, inputs, allow_inexact=self.allow_inexact)
            widths = checked_widths(self.widths, groups)
            with as_before_on_error(bare):
                sort_channels(bare, groups, inputs, self.order, allow_inexact=self.allow_inexact)
                give_norms(bare, groups, widths, self.norms, allow_inexact=self.allow_inexact)
            note_widths(bare)
            rank_zero_info(str(found))
        self.example_inputs = first_samples(inputs)

    def configure(self, module: LightningModule) -> None:
        network = resolve_network(module, self.network)
        has = self.adopt(network)
        if (has and not self.thinner(module)) or (not has and self.widths is not None and len(self.widths) > 1):
            self.build(network, inputs_on_device(module, network, self.example_inputs))
        self.renew_replicas(module)

    def finish(self, module: LightningModule) -> None:
        self._others.clear()

    def own_parameters(self, module: LightningModule) -> Mapping[str, nn.Parameter]:
        return parameters_of(module, self.held(module))

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        held, thinner = self.held(module), self.thinner(module)
        runs = 2 + RANDOM if self.universal else 1 + len(thinner)
        return replace(
            super().effects(trainer, module),
            modules=frozenset(() if held is None else held.state_dict()),
            looks_at=frozenset({"output"}) if thinner else frozenset(),
            replays=runs if thinner else 1,
            runs_thinner=bool(thinner),
            options={"modules": "widths=..."},
        )

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        self._generator.manual_seed(gather(torch.initial_seed())[0])  # rank 0's
        self._kept, self._stale = [], False
        if self.norms == "recalibrate" and Surroundings(trainer, module).averages:
            rank_zero_warn(
                "The statistics of norms at smaller widths are computed for the weights that train, and not for their "
                "average: call .recalibrate(loader) after the fit."
            )
        if labels := self.labels(module):
            self.weights.plan(trainer, len(labels), None if state is None else state["weights"])
        if state is None:
            return
        self.set_values_of_replicas(module, state["values"])
        self._generator.set_state(state["generator"].cpu())
        self._stale = state["stale"]
        if rank() < len(state["batches"]):
            self._kept = state["batches"][rank()]

    def state(self) -> dict[str, Any]:
        inputs, self._everywhere = self._everywhere or [self._kept], None
        return {
            "weights": self.weights.state(),
            "values": self.values_of_replicas(),
            "generator": self._generator.get_state(),
            "stale": self._stale,
            "batches": inputs,
        }

    def synchronize(self) -> None:
        self._everywhere = gather(self._kept)

    # ------------------------------------------------------------------ a step

    def labels(self, module: LightningModule) -> list[str]:
        return list(self._at(module))

    def every_label(self, module: LightningModule) -> list[str]:
        names = [label_of(width) for width in self.thinner(module)]
        return [*names, *_RANDOM_LABELS] if names and self.universal else names

    def full_label(self, module: LightningModule) -> str:
        return label_of(1.0)

    def _at(self, module: LightningModule) -> dict[str, float]:
        """Return the width of each replay now, by its label; none where the network runs at one width that was set."""
        thinner = self.thinner(module)
        trainer = module._trainer
        fits = trainer is not None and trainer.state.fn == "fit"
        if not fits and width_of(backbone(resolve_network(module, self.network))) != 1.0:
            return {}
        if thinner and self.universal and trainer is not None and trainer.training:
            drawn = self._drawn or [thinner[0]] * RANDOM
            return {label_of(thinner[0]): thinner[0], **dict(zip(_RANDOM_LABELS, drawn, strict=True))}
        return {label_of(width): width for width in thinner}

    def one_step(self, module: LightningModule, *args: Any, **kwargs: Any) -> WidthsStep:
        network = backbone(resolve_network(module, self.network))
        return WidthsStep(module, *args, widths=self._at(module), thin=partial(self._thin, network), **kwargs)

    def _thin(self, network: nn.Module, width: float) -> ThinNetwork:
        """Return the network of a width, also of one that has no statistics, as a step may draw it in training."""
        held = norms_of(network)
        assert held is not None, "there are labels"
        assert held.groups is not None, "there are labels"
        if width in held.widths:
            return thin_of(network, width)
        if width not in self._others:
            counts = counts_at(held.groups, width, allow_inexact=held.allow_inexact)
            self._others[width] = ThinNetwork(network, held.groups, counts, tracked=False)
        return self._others[width]

    def begin(self, module: LightningModule) -> None:
        if self.universal and module.trainer.training:
            least = self.thinner(module)[0]
            drawn = torch.empty(RANDOM).uniform_(least, 1.0, generator=self._generator).tolist()
            self._drawn = [min(max(least, round(width * _STEPS) / _STEPS), 1.0 - 1.0 / _STEPS) for width in drawn]

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._whole(module):
            return super().step(module, run, *args, **kwargs)

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        held = self.held(module)
        if held is not None and held.groups is None:
            self.say(
                f"The channels of {type(innermost(module)).__name__} are not known at its widths: what is logged is of "
                f"the full network alone. Pass example_inputs= to SlimmableWidth."
            )
        with self._whole(module):
            return super().evaluate(module, run, *args, **kwargs)

    @contextmanager
    def _whole(self, module: LightningModule) -> Iterator[None]:
        """Run the full network in the real steps of a fit, whichever width is set."""
        network = backbone(resolve_network(module, self.network))
        if module.trainer.state.fn != "fit" or width_of(network) == 1.0:
            yield
            return
        with answering(network, partial(type(network).forward, network), by=network):
            yield

    def after_step(self, one: OneStep) -> None:
        held = norms_of(backbone(one.network))
        if self.norms == "recalibrate" and held is not None and next(held.buffers(), None) is not None:
            self._kept = [*self._kept, inputs_of(one, samples=_SAMPLES)][-_BATCHES:]
            self._stale = True

    def sees(self, one: OneStep) -> bool:
        if self.collecting is not None:
            self.collecting(inputs_of(one))
        return self.collecting is not None

    def at_hook(self, name: str, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.collecting is not None:
            return run(*args, **kwargs)
        return super().at_hook(name, module, run, *args, **kwargs)

    def before_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Compute the statistics of all widths anew, from what the network has seen last, if it has learned since."""
        if not self._stale or self.norms != "recalibrate":
            return
        self._stale = False
        self.recalibrate(module, self._kept, self.thinner(module))

    def recalibrate(self, module: LightningModule, inputs: Sequence[ExampleInputs], widths: Iterable[Width]) -> None:
        """Compute the statistics of widths anew from what the network is called with."""
        network = backbone(resolve_network(module, self.network))
        held = norms_of(network)
        assert held is not None, "there are widths"
        assert held.groups is not None, "there are widths"
        for width in widths:
            if not held.of(width):
                counts = counts_at(held.groups, width, allow_inexact=held.allow_inexact)
                held.put(width, sliced_norms(network, held.groups, counts), persistent=False)
            thin = thin_of(network, width)
            thin.refresh(gradients=False)
            with nullcontext() if module._trainer is None else module._trainer.precision_plugin.forward_context():
                recalibrate(thin.module, inputs, batches=len(inputs))


_RANDOM_LABELS = [f"random{number}" for number in range(1, RANDOM + 1)]


def label_of(width: float) -> str:
    """Return the folder of what a width logs.

    Example:
        >>> label_of(0.25), label_of(1)
        ('width0.25', 'width1.0')
    """
    return f"width{float(width)}"
