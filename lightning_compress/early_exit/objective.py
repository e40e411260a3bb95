"""The objective of early exits: the user's own step, once with the network's output and once with each exit's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_compress.core.answering import answering
from lightning_compress.core.evaluation import entries_restored, evaluating, modes_restored, set_mode
from lightning_compress.core.example_inputs import ExampleInputs, call, first_samples, to_device
from lightning_compress.core.losses import soft_target_loss
from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit.heads import ExitHeads, heads_of, make_heads, reading
from lightning_compress.early_exit.one_step import (
    Gradient,
    OneStep,
    also_logged,
    backbone,
    exit_labels,
    full_label,
)
from lightning_compress.early_exit.placing import place_exits
from lightning_compress.early_exit.record import give_heads, note_heads
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.inputs import given_or_peeked, resolve_network
from lightning_compress.trainer.replay import replaying
from lightning_compress.trainer.replica import Before, Replica, traces
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.unwrap import SLOT, innermost
from lightning_compress.trainer.wrapper import Objective

Training = Literal["joint", "frozen"]
NAMED_WEIGHTS = ("equal", "rising")
_FEW = 4  # samples that are kept of a peeked batch, with which the network is cut into stages
_FIRST_RISING = 0.01  # the weight from which rising weights begin


class EarlyExits(Objective):
    """The objective that `EarlyExitHeads` adds; its arguments are that wrapper's.

    Attributes:
        collecting: Called in evaluation with the batch, the network's arguments, and the logits of every exit and of
            the full network; while it is set, steps are not replayed.
        serving: What answers in the place of the network in evaluation, if anything does; steps are not replayed then.
    """

    def __init__(self, exits: int | Sequence[float] | Sequence[str] | None, *, example_inputs: Any, **settings: Any):
        self.exits = checked_exits(exits)
        plain = {name: value for name, value in settings.items() if name != "head"}
        super().__init__(exits=self.exits, **plain)
        self.example_inputs: ExampleInputs | None = example_inputs
        self.num_classes: int = settings["num_classes"]
        self.head: Any = settings["head"]
        self.weights: Any = settings["weights"]
        self.train: Training = settings["train"]
        self.distill: float = float(settings["distill"])
        self.temperature: float = float(settings["temperature"])
        self.gradient: Gradient = settings["gradient"]
        self.network: str = settings["network"]
        self.output: str | int | None = settings["output"]
        self.collecting: Callable[[Any, Any, list[Tensor]], None] | None = None
        self.serving: Callable[..., Any] | None = None
        self._scheduled: list[Scheduled] = []
        self._frozen: list[nn.Parameter] = []
        self._step = 0
        self._returned: dict[str, Any] = {}  # by replays of the last batch
        self._said: set[str] = set()
        self._check()

    def _check(self) -> None:
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ValueError(f"num_classes is a whole number of 2 or more; got {self.num_classes!r}.")
        for name, known in (("train", get_args(Training)), ("gradient", get_args(Gradient))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if not 0.0 <= self.distill <= 1.0:
            raise ValueError(
                f"distill is the share of the full network's outputs in an exit's loss, 0 to 1; got {self.distill!r}."
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is a number above 0; got {self.temperature!r}.")
        if isinstance(self.weights, str) and self.weights not in NAMED_WEIGHTS:
            raise ValueError(
                f"weights is one of {', '.join(NAMED_WEIGHTS)}, or a number, or a schedule such as {{'start': 0.01, "
                f"'end': 0.5}}, for each exit and for the full network; got {self.weights!r}."
            )
        if self.train == "frozen" and self.gradient != "full":
            raise ValueError(
                f"gradient={self.gradient!r} is about gradients into the backbone, which train='frozen' does not "
                f"train: leave one of them out."
            )

    # ------------------------------------------------------------------ heads

    def heads(self, module: LightningModule) -> ExitHeads | None:
        """Return the heads of the module's network; None before they were made."""
        return heads_of(backbone(resolve_network(module, self.network)))

    def build(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Give a network its heads.

        Args:
            network: The network, or its compiled form.
            inputs: What it is called with.

        Raises:
            ValueError: A layer does not exist, does not run, runs twice or returns what no head reads; too few layers
                to choose from; the number of classes is another.
        """
        bare = backbone(network)
        assert self.exits is not None, "a network without exits= has its heads already"
        exits = self.exits
        if isinstance(exits, int):
            exits = [(number + 1) / (exits + 1) for number in range(exits)]
        if not exits:
            return
        layers = self.named_layers()
        if not layers:
            shares = [one for one in exits if isinstance(one, float)]
            layers = place_exits(bare, inputs, shares, output=self.output)
            rank_zero_info(f"Exits are placed after {', '.join(layers)}.")
        twice = next((layer for layer in layers if layers.count(layer) > 1), None)
        if twice is not None:
            raise ValueError(f"exits has {twice!r} twice: name each layer once.")
        features: dict[str, Tensor] = {}
        with (
            evaluating(bare),
            entries_restored(bare),
            torch.compiler.set_stance("force_eager"),
            reading(bare, layers, features.__setitem__),
        ):
            whole = call(bare, inputs)
        logits = select_output(whole, self.output, "The network")
        with torch.random.fork_rng([]):  # the random draws of the fit stay what they are without heads
            heads = make_heads(
                layers,
                features,
                logits,
                num_classes=self.num_classes,
                head=self.head,
                is_1d=lambda layer: type(bare.get_submodule(layer)).__name__.endswith("1d"),
            )
        give_heads(bare, heads)
        self.example_inputs = first_samples(inputs, _FEW)

    def named_layers(self) -> list[str]:
        """Return the names in `exits`."""
        return [one for one in self.exits if isinstance(one, str)] if isinstance(self.exits, list) else []

    def adopt(self, network: nn.Module) -> bool:
        """Take the heads that a network has already; return whether it has some.

        Raises:
            ValueError: They are at other layers than `exits` says.
        """
        heads = heads_of(backbone(network))
        if heads is None:
            return False
        wanted, names = self.exits, self.named_layers()
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
            device = next((one.device for one in network.parameters()), torch.device("cpu"))
            move = partial(to_device, device=device)
            inputs = move(given_or_peeked(module.trainer, module, network, self.example_inputs, move))
            self.build(network, inputs)
        heads = self.heads(module)
        self.replicas = {} if heads is None else {label: Replica.of(module) for label in exit_labels(heads)}
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
        heads = self.heads(module)
        if heads is None:
            return {}
        ids = {id(one) for one in heads.parameters() if one.requires_grad}
        return {name: one for name, one in innermost(module).named_parameters() if id(one) in ids}

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
        self._scheduled = self._weights_of(module, heads)
        for number, weight in enumerate(self._scheduled):
            weight.plan(trainer, None if state is None else state["weights"][number])
        for label, values in ({} if state is None else state["values"]).items():
            self.replicas[label].values |= values

    def _weights_of(self, module: LightningModule, heads: ExitHeads) -> list[Scheduled]:
        """Return the weight of each exit's loss, and of the full network's."""
        weights = self.weights
        if weights == "equal":
            weights = [1.0] * (len(heads) + 1)
        elif weights == "rising":
            shares = [(number + 1) / (len(heads) + 1) for number in range(len(heads))]
            weights = [{"start": min(_FIRST_RISING, share), "end": share} for share in shares] + [1.0]
        if not isinstance(weights, Sequence) or len(weights) != len(heads) + 1:
            raise ValueError(
                f"weights={self.weights!r} must have a number or a schedule for each of {len(heads)} exits, and one "
                f"for the full network."
            )
        made = [Scheduled.of(weight, f"weights[{number}]") for number, weight in enumerate(weights)]
        for one in made:
            if min(one.start, one.end) < 0:
                raise ValueError(f"weights are 0 or more; got {self.weights!r}.")
        return made

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        for weight in self._scheduled:
            weight.follow_epochs(moment)

    def at_step(self, step: int) -> None:
        self._step = step

    def state(self) -> dict[str, Any]:
        numbers = {
            label: {name: one for name, one in replica.own().items() if isinstance(one, int | float | str | Tensor)}
            for label, replica in self.replicas.items()
        }
        return {"weights": [weight.state() for weight in self._scheduled], "values": numbers}

    # ------------------------------------------------------------------ a step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heads = self.heads(module)
        if not heads or self._is_inside_another(module):
            return run(*args, **kwargs)
        one = self._begin(module, heads, (args, kwargs))
        with self._as_trained(module, heads), one.real_step():
            result = run(*args, **kwargs)
        own = loss_of(result)
        if own is None:  # a step that is skipped; Lightning refuses anything else
            return result
        one.was_called()
        weights = [weight.at(self._step) for weight in self._scheduled] or [1.0] * (len(heads) + 1)
        total = weights[-1] * own if self.train == "joint" else torch.zeros_like(own)
        for label, logits, weight in zip(one.replicas, one.exits(), weights, strict=False):
            replayed = one.replayed(label, logits, run)
            loss = loss_of(replayed)
            if loss is None:
                continue
            self._returned[label] = replayed if isinstance(replayed, Mapping) else {"loss": loss}
            if self.distill > 0.0:
                taught = soft_target_loss(logits, one.logits.detach(), temperature=self.temperature, class_dim=-1)
                loss = (1.0 - self.distill) * loss + self.distill * taught
            total = total + weight * loss
        self._keep_returned(module, "on_train_batch_end")
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def _begin(self, module: LightningModule, heads: ExitHeads, batch: Any) -> OneStep:
        self._returned.clear()
        folder = getattr(module, SLOT).label
        # Before the real step, in which Lightning looks for metrics by their names.
        replicas = {name: self.replica(module, name) for name in (f"{folder}{label}" for label in exit_labels(heads))}
        return OneStep(module, heads, self.network, self.output, self.gradient, replicas, batch)

    def _keep_returned(self, module: LightningModule, hook: str) -> None:
        """Keep what replays have returned for the hook at the batch's end, if the module has it."""
        if getattr(type(innermost(module)), hook) is getattr(LightningModule, hook):
            self._returned.clear()
        self._returned = tree_map_only(Tensor, Tensor.detach, self._returned)

    @contextmanager
    def _as_trained(self, module: LightningModule, heads: ExitHeads) -> Iterator[None]:
        """Run a frozen backbone as in evaluation, without gradients; another one as it is."""
        if self.train != "frozen":
            yield
            return
        network = backbone(resolve_network(module, self.network))
        with modes_restored(network), torch.no_grad():
            set_mode(network, False)
            yield

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heads = self.heads(module)
        if not heads and self.exits:
            self._say(
                f"The exits of {type(innermost(module)).__name__} have no heads yet, as no fit has begun: what is "
                f"logged is of the full network alone. Pass example_inputs=, or fit or load the module."
            )
        if not heads or self._is_inside_another(module):
            return run(*args, **kwargs)
        if self.serving is not None:
            with answering(resolve_network(module, self.network), self.serving):
                return run(*args, **kwargs)
        one = self._begin(module, heads, (args, kwargs))
        with one.real_step():
            result = run(*args, **kwargs)
        if not one.called:
            self._say(
                f"The {module.trainer.state.stage} step of {type(innermost(module)).__name__} does not call the "
                f"network {self.network!r}: what it logs is of the full network alone."
            )
            return result
        exits = one.exits()
        if self.collecting is not None:
            args, kwargs = one.before.batch()  # the step may have taken its batch apart
            batch = args[0] if args else next(iter(kwargs.values()))
            self.collecting(batch, one.inputs, [*exits, one.logits])
            return result
        for label, logits in zip(one.replicas, exits, strict=True):
            self._returned[label] = one.replayed(label, logits, run)
        self._keep_returned(module, f"on_{'test' if module.trainer.testing else 'validation'}_batch_end")
        return result

    def _is_inside_another(self, module: LightningModule) -> bool:
        """Whether another wrapper of this kind is around it, with which a fit will be refused."""
        levels: Any = getattr(module, SLOT).levels
        return any(isinstance(level.objective, EarlyExits) for level in levels[self.depth + 1 :])

    def _say(self, message: str) -> None:
        """Warn of something once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(message)

    def at_hook(self, name: str, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heads = self.heads(module)
        if not heads or self.collecting or self.serving or self._is_inside_another(module):
            return run(*args, **kwargs)
        network = backbone(resolve_network(module, self.network))
        replicas = {label: self.replica(module, label) for label in exit_labels(heads)}
        before = Before(module, network, replicas.values(), (args, kwargs))
        was = traces(module, before, replicas.values())
        with also_logged(module, full_label(heads)):
            result = run(*args, **kwargs)
        if traces(module, before, replicas.values()) == was:
            return result  # it has nothing to do with what the steps have found
        before.after_real_step()
        for label, replica in replicas.items():
            again, by_name = before.batch()
            if name.endswith("batch_end") and again:  # what the step has returned comes first
                again = (self._returned.get(label, again[0]), *again[1:])
            with replaying(module, label, replica, before):
                run(*again, **by_name)
        return result

    def replica(self, module: LightningModule, label: str) -> Replica:
        """Return what the replays with this label have to themselves."""
        if label not in self.replicas:
            self.replicas[label] = Replica.of(module)
        return self.replicas[label]


def loss_of(result: Any) -> Tensor | None:
    """Return the loss of what a step returns; None if there is none."""
    loss = result.get("loss") if isinstance(result, Mapping) else result
    return loss if isinstance(loss, Tensor) else None


def checked_exits(exits: Any) -> int | list[float | str] | None:
    """Return exits as a number, as names or as shares of the network's cost; None for those that it has already.

    Raises:
        ValueError: They are none of these.

    Example:
        >>> checked_exits(("block1", "block2")), checked_exits(3)
        (['block1', 'block2'], 3)
    """
    if exits is None or (isinstance(exits, int) and not isinstance(exits, bool) and exits >= 0):
        return exits
    given = exits if isinstance(exits, Sequence) and not isinstance(exits, str) else [None]
    names = all(isinstance(one, str) for one in given)
    shares = all(isinstance(one, float) and 0.0 < one < 1.0 for one in given)
    if not (names or shares):
        raise ValueError(
            f"exits is a list of names of layers, a number of exits, 0 or more, or an ascending list of shares of the "
            f"network's cost between 0 and 1, such as [0.25, 0.5, 0.75]; got {exits!r}."
        )
    return [*given]
