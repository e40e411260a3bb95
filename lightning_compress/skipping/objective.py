"""The objective of gates: the user's own loss, and how far the gates are from their budget.

loss = the step's loss + w budget(t)        t falls from 1 to the target, then stays
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.core.answering import copied_alone
from lightning_compress.core.distributed import gather
from lightning_compress.core.example_inputs import ExampleInputs, first_samples
from lightning_compress.core.given import flag, real_number
from lightning_compress.core.schedule import checked_epochs
from lightning_compress.skipping.budget import Budget, Measured, budget_loss, measured
from lightning_compress.skipping.gates import Decisions, GateKind, SkipGates, gates_of, new_gates
from lightning_compress.skipping.record import give_gates, note_gates, take_gates
from lightning_compress.skipping.rewards import Rewards, set_drawing
from lightning_compress.stages.block import chosen_blocks
from lightning_compress.stages.blocks import find_blocks
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.replaying import loss_of, with_loss
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.steps import is_written
from lightning_compress.trainer.unwrap import innermost, parameters_of
from lightning_compress.trainer.wrapper import Objective

Training = Literal["straight_through", "hybrid", "reinforce"]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_FALLS = 0.5  # share of the time until end_epoch in which the target falls


class Skipping(Objective):
    """The objective that `SkippableBlocks` adds; its arguments are that wrapper's.

    Attributes:
        measuring: Gets what an evaluation finds, which then sets the rates, as that of a fit does.
    """

    refuses_replays: ClassVar[bool] = True

    def __init__(self, blocks: str | Sequence[str] | None, *, example_inputs: Any, **settings: Any) -> None:
        self.blocks = [blocks] if isinstance(blocks, str) else None if blocks is None else list(blocks)
        used = "target is the share of the network's MACs that samples use on average, between 0 and 1"
        settings["target"] = real_number(settings["target"], used, above=0, below=1)
        for name in ("weight", "temperature"):
            settings[name] = real_number(settings[name], f"{name} is a number above 0", above=0)
        flag(settings["noise"], "noise")
        _, settings["end_epoch"] = checked_epochs(0.0, settings["end_epoch"])
        super().__init__(blocks=self.blocks, **settings)
        self.example_inputs: ExampleInputs | None = example_inputs
        self.gate: GateKind | None = settings["gate"]
        self.target: float = settings["target"]
        self.budget: Budget = settings["budget"]
        self.weight: float = settings["weight"]
        self.train: Training = settings["train"]
        self.temperature: float = settings["temperature"]
        self.noise: bool = settings["noise"]
        self.network: str = settings["network"]
        self.output: str | int | None = settings["output"]
        self.measuring: list[Measured] | None = None
        self._schedule = Scheduled(start=1.0, end=0.0, end_epoch=settings["end_epoch"])
        self._gates: SkipGates | None = None  # that a fit trains
        self._seen: list[Tensor] = []  # decisions of the evaluation that runs
        self._rewards = Rewards(self.network, self.output)
        self._said = False
        self._ran = False  # in a step of this fit
        self._step = 0
        self._counted: Shapes | None = None  # of the network whose MACs the gates know
        self._check()

    def _check(self) -> None:
        for name, known in (("budget", get_args(Budget)), ("train", get_args(Training))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if self.gate is not None and self.gate not in get_args(GateKind):
            raise ValueError(f"gate is one of {', '.join(get_args(GateKind))}; got {self.gate!r}.")

    # ------------------------------------------------------------------ gates

    def gates(self, module: LightningModule) -> SkipGates | None:
        """Return the gates of the module's network; None before they were made."""
        return gates_of(backbone(resolve_network(module, self.network)))

    def build(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Give a network its gates.

        Args:
            network: The network, or its compiled form.
            inputs: What it is called with.

        Raises:
            ValueError: There is no block to skip, or none of a name in `blocks`; the target is below what the network
                costs without its blocks.
        """
        if self.blocks == []:
            return
        bare = backbone(network)
        found = find_blocks(bare, inputs, output=self.output)
        blocks = chosen_blocks(found, self.blocks)
        gates = new_gates(bare, inputs, blocks, macs=found.macs, kind=self.gate or "per_block")
        self._check_target(gates)
        give_gates(bare, gates)
        self.example_inputs, self._counted = first_samples(inputs), _shapes(bare)
        rank_zero_info(
            f"Samples may skip {', '.join(one.name for one in blocks)}: at most {1 - gates.least:.0%} of the MACs."
        )

    def adopt(self, network: nn.Module) -> bool:
        """Take the gates that a network has already; return whether it has some.

        Raises:
            ValueError: They are others than `blocks` and `gate` say.
        """
        gates = gates_of(backbone(network))
        if gates is None:
            return False
        names = [one.name for one in gates.blocks]
        if self.blocks is not None and set(self.blocks) != set(names):
            raise ValueError(
                f"The network has gates before {', '.join(names)} already, and blocks= says "
                f"{', '.join(self.blocks) or 'none'}: pass blocks=None to go on with those."
            )
        if self.gate is not None and self.gate != gates.kind:
            raise ValueError(f"The network has gates of the kind {gates.kind!r} already; got gate={self.gate!r}.")
        self._check_target(gates)
        note_gates(backbone(network))
        return True

    def recount(self, network: nn.Module, inputs: ExampleInputs) -> None:
        """Count the MACs of the blocks anew where the network is another than that in which they were counted.

        A cut leaves gates where they are, and the shares of its blocks are others then.

        Raises:
            ValueError: A block with a gate is not there any more; the target is below what is left without the blocks.
        """
        bare = backbone(network)
        gates = gates_of(bare)
        if gates is None or self._counted == _shapes(bare):
            return
        alone = copied_alone(bare)
        take_gates(alone)
        found = find_blocks(alone, inputs, output=self.output)
        known = {one.name: one for one in found.candidates}
        for one in gates.blocks:
            if one.name not in known:
                raise ValueError(
                    f"The network has a gate before {one.name!r}, which is no residual block of it any more: let "
                    f"blocks leave before the network gets gates."
                )
        gates.blocks = tuple(replace(one, macs=known[one.name].macs) for one in gates.blocks)
        gates.macs, self._counted = found.macs, _shapes(bare)
        self._check_target(gates)

    def _check_target(self, gates: SkipGates) -> None:
        if self.target <= gates.least:
            names = ", ".join(one.name for one in gates.blocks)
            raise ValueError(
                f"target={self.target} is below what is left without the blocks {names}: {gates.least:.3f} of the "
                f"MACs. Take a larger target, or name more blocks."
            )

    def configure(self, module: LightningModule) -> None:
        network = resolve_network(module, self.network)
        if self.adopt(network):
            if self._counted != _shapes(backbone(network)):
                self.recount(network, inputs_on_device(module, network, self.example_inputs))
        elif self.blocks != []:
            self.build(network, inputs_on_device(module, network, self.example_inputs))

    def own_parameters(self, module: LightningModule) -> Mapping[str, nn.Parameter]:
        return parameters_of(module, self.gates(module))

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        there = self.blocks != [] or self.gates(module) is not None
        return replace(
            super().effects(trainer, module),
            modules=frozenset(self.own_parameters(module)),
            looks_at=frozenset({"layers"}) if there else frozenset(),
            skips=there,
            chooses_by_sample=there,
            options={"modules": "blocks=...", "looks_at": "blocks=..."},
        )

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        self._gates = self.gates(module)
        self._seen, self._ran = [], False
        if self._gates is None:
            return
        self._schedule.plan(trainer, None if state is None else state["schedule"])
        self._gates.temperature = self.temperature
        if state is not None:
            self._said, self._rewards.price = state["said"], state["price"]

    def state(self) -> dict[str, Any]:
        return {"schedule": self._schedule.state(), "said": self._said, "price": self._rewards.price}

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        self._schedule.follow_epochs(moment)

    def at_step(self, step: int) -> None:
        self._step = step
        if self._gates is not None:
            progress = self._schedule.progress(step)
            self._gates.draws = self._rewarded or (self.noise and progress < 1.0)
            share = min(1.0, progress / _FALLS) if self.train == "reinforce" and self._gates.kind == "policy" else 1.0
            set_drawing(self._gates, rewarded=self._rewarded, curriculum=share)

    @property
    def _rewarded(self) -> bool:
        """Whether gates learn from rewards now."""
        return self.train == "reinforce" or (self.train == "hybrid" and self._schedule.progress(self._step) == 1.0)

    def finish(self, module: LightningModule) -> None:
        if self._gates is not None:
            self._gates.draws = False
            set_drawing(self._gates, rewarded=False, curriculum=1.0)

    def target_now(self) -> float:
        """Return the target after the last step."""
        return 1.0 - (1.0 - self.target) * min(1.0, self._schedule.progress(self._step) / _FALLS)

    def progress(self) -> Progress:
        if self._gates is None:
            return Progress(fraction=0.0)
        share = self._schedule.progress(self._step)
        return Progress(fraction=share, finished=share == 1.0, numbers={"target": self.target_now})

    # ------------------------------------------------------------------ a step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gates = self.gates(module)
        if gates is None:
            return run(*args, **kwargs)
        watched = self._rewards.watched(module) if self._rewarded else nullcontext(None)
        with watched, gates.collecting() as decisions:
            result = run(*args, **kwargs)
        own = loss_of(result)
        if own is None:  # a step that is skipped; Lightning refuses anything else
            return result
        if self._ran and not self._rewarded and decisions.runs() is None:  # as with all blocks dropped in this step
            return result
        runs = self._runs(module, decisions, own)
        self._ran = True
        if is_written(module):
            module.log(self.logged_name("target"), self.target_now(), prog_bar=True)
            module.log(self.logged_name("train_used"), gates.used(runs.detach().mean(0)))
        if self._rewarded:
            batch = args[0] if args else next(iter(kwargs.values()))
            added = self._rewards.loss(module, gates, decisions, batch, self.target_now())
        else:
            added = self.weight * budget_loss(gates, runs, self.target_now(), self.budget)
        return with_loss(result, own + added.to(own.dtype))

    def _runs(self, module: LightningModule, decisions: Decisions, own: Tensor) -> Tensor:
        """Return who ran which block in a step of a training."""
        runs = decisions.runs()
        if runs is None:
            raise ValueError(
                f"The training_step of {type(innermost(module)).__name__} did not run the network {self.network!r}, "
                f"whose blocks have gates: pass network= with the path of the submodule whose output is the prediction."
            )
        logits = decisions.logits()
        assert logits is not None, "there are runs"
        if own.requires_grad and not logits.requires_grad and self.own_parameters(module):
            raise ValueError(
                "The gates have no gradient, and would learn nothing: the network ran under torch.no_grad(), in "
                "evaluation mode, or in a reentrant checkpoint (use_reentrant=False is supported)."
            )
        return runs

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gates = self.gates(module)
        if gates is None or module.trainer.sanity_checking:
            return run(*args, **kwargs)
        with gates.collecting() as decisions:
            result = run(*args, **kwargs)
        runs = decisions.runs()
        if runs is not None:
            self._seen.append(runs.detach().bool().cpu())
        return result

    def after_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        gates = self.gates(module)
        if gates is None or trainer.sanity_checking:
            return
        counts: Counter[tuple[bool, ...]] = Counter()
        seen, self._seen = self._seen, []
        if seen:
            counts.update(map(tuple, torch.cat(seen).tolist()))
        everyones = sum(gather(counts), Counter())
        if not everyones:
            return
        found = measured(gates, everyones)
        for name in ("used", "varying"):
            module.log(self.logged_name(name), getattr(found, name), sync_dist=True)
        if self.measuring is not None:
            self.measuring.append(found)
        if self.measuring is not None or trainer.state.fn == "fit":
            with torch.inference_mode(False):  # else nobody could write into them
                gates.rates = torch.tensor(list(found.rates.values()), dtype=torch.float64)
        if trainer.state.fn == "fit" and self._schedule.progress(self._step) >= _FALLS:
            self._warn_of_collapse(found)

    def _warn_of_collapse(self, found: Measured) -> None:
        if self._said or found.varying > 0.0:
            return
        self._said = True
        rates = found.rates.values()
        what = "open" if min(rates) > 0.5 else "closed" if max(rates) < 0.5 else "the same"
        remedy = {
            "open": "Take a larger weight=, a larger learning rate, or a longer fit",
            "closed": "Take a larger target=, or a smaller weight= or learning rate",
            "the same": "Take budget='per_gate' or a longer fit; or prune_blocks, which removes blocks for good",
        }[what]
        rank_zero_warn(
            f"The gates are {what} for all samples at step {self._step}, with {found.used:.1%} of the MACs, which is a "
            f"static choice of blocks. {remedy}."
        )


def _shapes(network: nn.Module) -> Shapes:
    return tuple((name, tuple(one.shape)) for name, one in network.named_parameters())
