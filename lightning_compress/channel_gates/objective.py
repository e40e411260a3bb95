"""The objective of gated channels: the user's own step with the gates in its network, and a penalty on their gains.

loss' = loss + penalty * mean over the samples of the sum of all gains
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.channel_gates.find import FoundLayers, find_layers, magnitudes
from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.kinds import FeatureGate, GroupGate, Train, checked_share
from lightning_compress.channel_gates.making import give_gates
from lightning_compress.channel_gates.record import note_gates
from lightning_compress.channel_gates.rewards import Agent, errors
from lightning_compress.core.distributed import all_reduce_sum, world_size
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.given import real_number
from lightning_compress.core.outputs import select_output
from lightning_compress.core.schedule import checked_epochs
from lightning_compress.trainer.capture import captured
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.replaying import loss_of, with_loss
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.steps import is_written
from lightning_compress.trainer.unwrap import parameters_of
from lightning_compress.trainer.wrapper import Objective

Seen = Sequence[tuple[Tensor, Tensor]]  # scores and choices of the gates that have run
Run = Callable[[], Any]
Added = Tensor | None
_EXPLORE, _EXPLORE_LAST = 0.2, 0.05  # shares of samples that choose groups at random, while the share falls and later
_SHARE = 0.5  # where the user names none
_STATIC = 0.02  # share of channels below which the choice is called the same for all samples


class GatedChannels(Objective):
    """The objective that `ChannelGates` adds; its arguments are that wrapper's.

    Attributes:
        found: The layers, once they were found; None for a network that came with its gates.
        example_inputs: Some of those with which they were found.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None,
        *,
        share: float | None,
        train: Train,
        start_epoch: float,
        end_epoch: float | None,
        penalty: float,
        network: str,
        output: str | int | None,
        example_inputs: ExampleInputs | None,
    ) -> None:
        names = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        share = None if share is None else checked_share(share)
        start_epoch, end_epoch = checked_epochs(start_epoch, end_epoch)
        penalty = real_number(penalty, "penalty is the weight of the sum of all gains, 0 or more", least=0)
        super().__init__(
            layers=names,
            share=share,
            train=train,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            penalty=penalty,
            network=network,
            output=output,
        )
        self.names = names
        self.share = share
        self.epochs = {"start_epoch": start_epoch, "end_epoch": end_epoch}
        self.penalty = penalty
        self.network, self.output = network, output
        self.train: Train = train
        self.agent = Agent()
        self.example_inputs = example_inputs
        self.found: FoundLayers | None = None
        self.training_share = Scheduled.of(1.0, "share")
        self._start: float | None = None  # the share with which training begins, once there are gates
        self._step = 0
        self._said_static = False
        if train not in get_args(Train):
            raise ValueError(f"train is one of {', '.join(get_args(Train))}; got {train!r}.")

    # ------------------------------------------------------------------ gates

    @property
    def idle(self) -> bool:
        """Whether the settings ask for no gates."""
        return self.share == 1.0 or self.names == []

    def gates(self, module: LightningModule) -> LayerGates | None:
        """Return the gates of the module's network; None before they were made."""
        return gates_of(backbone(resolve_network(module, self.network)))

    def build(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Give a network its gates, with which it computes what it did before while all channels are kept.

        Args:
            network: The network, or its compiled form.
            inputs: What it is called with.

        Raises:
            ValueError: No layer can have gates, or one that was named.
        """
        if self.idle:
            return
        share = _SHARE if self.share is None else self.share
        bare = backbone(network)
        found = find_layers(bare, inputs, self.names)
        like = next(iter(bare.parameters()))
        scores = {one.name: magnitudes(bare, one, found.readers.get(one.name, ())) for one in found.layers}
        orders = {name: some.argsort(descending=True, stable=True).tolist() for name, some in scores.items()}
        gates = LayerGates(found.layers, share, None if self.train == "gradient" else orders)
        for name, gate in gates.by_layer().items():
            if isinstance(gate, FeatureGate):
                gate.magnitude.copy_(scores[name])
        give_gates(bare, gates.to(like.device, like.dtype))
        note_gates(bare)
        self._start, self.found = 1.0, found
        self.example_inputs = first_samples(inputs)

    def adopt(self, network: nn.Module) -> bool:
        """Take the gates that a network has already; return whether it has some.

        Raises:
            ValueError: They are at other layers than `layers` says.
        """
        gates = gates_of(backbone(network))
        if gates is None:
            return False
        have = [layer.name for layer in gates.layers]
        if self.names is not None and set(self.names) != set(have):
            raise ValueError(
                f"The network has gates at {', '.join(have)} already, and layers= says "
                f"{', '.join(self.names) or 'none'}: pass layers=None to go on with those."
            )
        if (gates.orders is None) != (self.train == "gradient"):
            kind = "gradient" if gates.orders is None else "q_learning"
            raise ValueError(f"The network has gates already, which learn by train={kind!r}; got {self.train!r}.")
        if self._start is None:
            self._start = gates.share
        if self.share is not None:
            gates.share = self.share
        note_gates(backbone(network))
        return True

    def configure(self, module: LightningModule) -> None:
        network = resolve_network(module, self.network)
        if self.adopt(network) or self.idle:
            return
        self.build(network, inputs_on_device(module, network, self.example_inputs))

    def finish(self, module: LightningModule) -> None:
        gates = self.gates(module)
        if gates is not None:
            gates.training_share, gates.explore = None, 0.0

    def own_parameters(self, module: LightningModule) -> Mapping[str, nn.Parameter]:
        return parameters_of(module, self.gates(module))

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        gates = self.gates(module)
        return replace(
            super().effects(trainer, module),
            modules=frozenset(self.own_parameters(module)),
            looks_at=frozenset() if gates is None else frozenset({"layers"}),
            chooses_by_sample=gates is not None,
            options={"looks_at": "share=...", "modules": "share=..."},
        )

    def progress(self) -> Progress:
        share = self.training_share
        fraction = share.progress(self._step)
        numbers = {} if share.constant else {"channels": partial(share.at, self._step)}
        return Progress(fraction=0.0 if share.constant else fraction, finished=fraction == 1.0, numbers=numbers)

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        gates = self.gates(module)
        if gates is None:
            return
        falls = self.training_share
        if falls.ramp is None:  # a second fit goes on with the share that the first one has reached
            assert self._start is not None, "there are gates"
            falls = Scheduled.of({"start": self._start, "end": gates.share, **self.epochs}, "share")
        falls.plan(trainer, None if state is None else state["share"])
        self.training_share = falls
        if state is not None:
            self.agent.price = state["price"]

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        self.training_share.follow_epochs(moment)

    def at_step(self, step: int) -> None:
        self._step = step

    def state(self) -> dict[str, Any]:
        return {"share": self.training_share.state(), "price": self.agent.price}

    def before_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Bring what the ranks have counted together; say it once if all samples keep the same channels."""
        gates = self.gates(module)
        for gate in () if gates is None else gates.by_layer().values():
            all_reduce_sum(gate.used.div_(world_size()))
        if gates is None or self._said_static or self.training_share.progress(self._step) < 1.0:
            return
        if (varying := gates.varying()) < _STATIC:
            self._said_static = True
            rank_zero_warn(
                f"ChannelGates: {varying:.1%} of the channels are kept for some samples and not for others, so that "
                f"the gates choose the same channels for all. Cut the others for good, or train with a larger learning "
                f"rate for the gates, or for longer."
            )

    # ------------------------------------------------------------------ a step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gates = self.gates(module)
        if gates is None:
            return run(*args, **kwargs)
        share = gates.training_share = self.training_share.at(self._step)
        if is_written(module):
            module.log(self.logged_name("channels"), share, prog_bar=True)
            module.log(self.logged_name("varying"), gates.varying())
        add = self._with_penalty if gates.orders is None else self._with_rewards
        with gates.collecting() as seen:
            result, added = add(module, gates, seen, partial(run, *args, **kwargs))
        loss = loss_of(result)
        if loss is None or added is None:
            return result
        return with_loss(result, loss + added.to(loss.dtype))

    def _with_penalty(self, module: LightningModule, gates: LayerGates, seen: Seen, run: Run) -> tuple[Any, Added]:
        """Run the step, and return what it returns, and the penalty on the gains of all gates."""
        result = run()
        gains = [scores.sum(1).mean() for scores, _ in seen if scores.requires_grad]
        return result, self.penalty * torch.stack(gains).sum() if gains and self.penalty else None

    def _with_rewards(self, module: LightningModule, gates: LayerGates, seen: Seen, run: Run) -> tuple[Any, Added]:
        """Run the step, and return what it returns, and the loss of the agents that choose groups."""
        share, found = self.training_share, list[Any]()
        gates.explore = _EXPLORE_LAST if share.progress(self._step) == 1.0 else _EXPLORE
        with captured(module, self.network, lambda *_: None, found.append) as was_called:
            result = run()
        loss = loss_of(result)
        if loss is None:
            return result, None
        was_called()
        wrong = errors(loss, select_output(found[0], self.output, "The network"))
        mine = [one for one in gates.by_layer().values() if isinstance(one, GroupGate)]
        added = self.agent.loss(mine, seen, wrong)
        self.agent.pay(seen, share.at(self._step))
        return result, added
