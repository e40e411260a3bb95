"""The objective of early exits: the user's own step, once with the network's output and once with each exit's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.evaluation import modes_restored, set_mode
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.given import whole_number
from lightning_compress.early_exit.heads import ExitHeads, heads_of
from lightning_compress.early_exit.making import checked_exits, named, new_heads
from lightning_compress.early_exit.one_step import ExitsStep, Gradient
from lightning_compress.early_exit.record import give_heads, note_heads
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.one_step import OneStep, backbone, computing
from lightning_compress.trainer.replaying import ReplayingObjective
from lightning_compress.trainer.unwrap import innermost, parameters_of

Training = Literal["joint", "frozen"]


class EarlyExits(ReplayingObjective):
    """The objective that `EarlyExitHeads` adds; its arguments are that wrapper's.

    Attributes:
        collecting: Called in evaluation with the batch, the network's arguments, and the logits of every exit and of
            the full network; while it is set, steps are not replayed.
    """

    def __init__(self, exits: int | Sequence[float] | Sequence[str] | None, *, example_inputs: Any, **settings: Any):
        self.exits = checked_exits(exits)
        plain = {name: value for name, value in settings.items() if name != "head"}
        if plain["weights"] is None:
            trains_before = plain["train"] == "joint" and plain["gradient"] == "full"  # the layers before exits
            plain["weights"] = "rising" if trains_before else "equal"
        super().__init__(exits=self.exits, **plain)
        self.example_inputs: ExampleInputs | None = example_inputs
        self.num_classes: int = settings["num_classes"]
        self.head: Any = settings["head"]
        self.train: Training = settings["train"]
        self.trains_full = self.train == "joint"
        self.gradient: Gradient = settings["gradient"]
        self.collecting: Callable[[Any, Any, list[Tensor]], None] | None = None
        self._frozen: list[nn.Parameter] = []
        self._check()

    def _check(self) -> None:
        whole_number(self.num_classes, "num_classes is a whole number of 2 or more", least=2)
        for name, known in (("train", get_args(Training)), ("gradient", get_args(Gradient))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if self.train == "frozen" and self.gradient != "full":
            raise ValueError(
                f"gradient={self.gradient!r} is about gradients into the backbone, which train='frozen' does not "
                f"train: leave one of them out."
            )

    # ------------------------------------------------------------------ heads

    def heads(self, module: LightningModule) -> ExitHeads | None:
        """Return the heads of the module's network; None before they were made."""
        return heads_of(computing(resolve_network(module, self.network)))

    def build(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Give a network its heads.

        Args:
            network: The network, or its compiled form.
            inputs: What it is called with.

        Raises:
            ValueError: A layer does not exist, does not run, runs twice or returns what no head reads; too few layers
                to choose from; the number of classes is another.
        """
        assert self.exits is not None, "a network without exits= has its heads already"
        if not self.exits:
            return
        bare = backbone(network)
        heads = new_heads(bare, inputs, self.exits, num_classes=self.num_classes, head=self.head, output=self.output)
        give_heads(bare, heads)
        self.example_inputs = first_samples(inputs)

    def adopt(self, network: nn.Module) -> bool:
        """Take the heads that a network has already; return whether it has some.

        Raises:
            ValueError: They are at other layers than `exits` says.
        """
        heads = heads_of(backbone(network))
        if heads is None:
            return False
        wanted, names = self.exits, named(self.exits)
        if names and set(names) != set(heads.layers):
            raise ValueError(
                f"The network has exits at {', '.join(heads.layers)} already, and exits= says {', '.join(names)}."
            )
        if isinstance(wanted, int | list) and (wanted if isinstance(wanted, int) else len(wanted)) != len(heads):
            raise ValueError(f"The network has {len(heads)} exits already, and exits={wanted!r} wants others.")
        note_heads(backbone(network))
        return True

    def configure(self, module: LightningModule) -> None:
        network = resolve_network(module, self.network)
        if not self.adopt(network) and self.exits:
            self.build(network, inputs_on_device(module, network, self.example_inputs))
        heads = self.heads(module)
        self.renew_replicas(module)
        if heads is not None and self.train == "frozen" and not self._frozen:
            own = {id(parameter) for parameter in heads.parameters()}
            self._frozen = [one for one in module.parameters() if id(one) not in own and one.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def finish(self, module: LightningModule) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def own_parameters(self, module: LightningModule) -> Mapping[str, nn.Parameter]:
        return parameters_of(module, self.heads(module))

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        heads = self.heads(module)
        return replace(
            super().effects(trainer, module),
            modules=frozenset(self.own_parameters(module)),
            looks_at=frozenset({"layers", "output"}) if heads else frozenset(),
            replays=1 if heads is None else len(heads) + 1,
            options={"looks_at": "exits=...", "modules": "exits=..."},
        )

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        heads = self.heads(module)
        if heads is None:
            return
        self.weights.plan(trainer, len(heads), None if state is None else state["weights"])
        if state is not None:
            self.set_values_of_replicas(module, state["values"])

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights.state(), "values": self.values_of_replicas()}

    # ------------------------------------------------------------------ a step

    def labels(self, module: LightningModule) -> list[str]:
        heads = self.heads(module)
        return [] if heads is None else [f"exit{number}" for number in range(1, len(heads) + 1)]

    def full_label(self, module: LightningModule) -> str:
        return f"exit{len(self.labels(module)) + 1}"

    def one_step(self, module: LightningModule, *args: Any, **kwargs: Any) -> ExitsStep:
        heads = self.heads(module)
        assert heads is not None, "there are labels"
        return ExitsStep(module, *args, heads=heads, gradient=self.gradient, **kwargs)

    @contextmanager
    def as_trained(self, module: LightningModule) -> Iterator[None]:
        """Run a frozen backbone as in evaluation, without gradients; another one as it is."""
        if self.train != "frozen":
            yield
            return
        network = computing(resolve_network(module, self.network))
        with modes_restored(network), torch.no_grad():
            set_mode(network, False)
            yield

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.exits and not self.heads(module):
            self.say(
                f"The exits of {type(innermost(module)).__name__} have no heads yet, as no fit has begun: what is "
                f"logged is of the full network alone. Pass example_inputs=, or fit or load the module."
            )
        return super().evaluate(module, run, *args, **kwargs)

    def sees(self, one: OneStep) -> bool:
        if self.collecting is None:
            return False
        args, kwargs = one.before.batch()  # the step may have taken its batch apart
        batch = args[0] if args else next(iter(kwargs.values()))
        self.collecting(batch, one.inputs, [*(one.logits_of(label) for label in one.replicas), one.logits])
        return True

    def at_hook(self, name: str, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.collecting is not None:
            return run(*args, **kwargs)
        return super().at_hook(name, module, run, *args, **kwargs)
