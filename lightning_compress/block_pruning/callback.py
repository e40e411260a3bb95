"""Static depth as a callback: residual blocks with the least importance leave during the fit, and the rest recovers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import inf, isnan
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.block_pruning.influence import Influence
from lightning_compress.block_pruning.losses import check_steps, loss_of_blocks
from lightning_compress.block_pruning.prune import least_important, take_out, within
from lightning_compress.block_pruning.record import follow_depth
from lightning_compress.block_pruning.stand_in import StandIn
from lightning_compress.core.distributed import broadcast, on_all_ranks, rank
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.hooks import Removable
from lightning_compress.core.schedule import (
    Schedule,
    amount_at,
    check_interval,
    check_schedule,
    checked_amount,
    checked_epochs,
)
from lightning_compress.core.structure import follow
from lightning_compress.stages.block import Block, chosen_blocks
from lightning_compress.stages.blocks import find_blocks
from lightning_compress.stages.branch_hooks import gated
from lightning_compress.trainer.averages import averaged_modules, copies_inside
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import resolve_network, traced_network
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.step_window import Ramp
from lightning_compress.trainer.surgery import keep_metadata, rewrapped
from lightning_compress.trainer.targets import refuse_average_in_forward
from lightning_compress.trainer.unwrap import innermost

Criterion = Literal["loss", "influence"]


class BlockPruningCallback(CompressionCallback):
    """Takes residual blocks out of the network while it trains: those that matter least, for good, with their weights.

    At every event the blocks with the lowest scores leave, so that at most a fraction a(p) of the multiply-accumulates
    of ALL blocks is gone, where p is the progress from `start_epoch` to `end_epoch` and a is the schedule. The rest of
    the network trains on, and gets faster at once. A block's shortcut stays; state dicts, checkpoints and compressed
    files say what has left, and `load_compressed` takes it out of a network of the dense class.

    Args:
        amount: Share of the blocks' multiply-accumulates that leaves in the end, at most; 0 to 1.
        blocks: Names of the blocks that may leave, or glob patterns; by default all whose shortcut has no layers.
        criterion: "loss": by how much the loss of the module's own step rises without the block, for each
            multiply-accumulate; blocks are chosen one after the other, each without those chosen before. "influence":
            1 - cos(x, x + F(x)), the mean over the training steps since the previous event.
        n_batches: For criterion="loss": training batches that are read for it at each event.
        schedule: Shape of the ramp; "one_shot": all at `start_epoch`.
        start_epoch: Begin of the ramp, in epochs, which may be fractions.
        end_epoch: End of the ramp; by default after two thirds of the planned steps, so that recovery follows.
        every_n_steps: Optimizer steps between events; by default one epoch.
        stochastic_depth: Until the ramp ends, the last block is left out for each training sample with this
            probability, and earlier ones with smaller ones, in proportion to their place; the branches of samples that
            run it are scaled up, so that their mean stays.
        network: Dotted path of the submodule whose output is the prediction.
        output: Which tensor of its output is the prediction: a key, position or attribute.
        example_inputs: Inputs to trace the network with: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments, batch first. By default `example_input_array`, else one peeked batch.

    Raises:
        ValueError: An argument is out of range.

    References:
        Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"; Huang et al.
        2016, "Deep Networks with Stochastic Depth".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> depth = BlockPruningCallback(0.4, schedule="one_shot", start_epoch=2.0)
        >>> trainer = Trainer(callbacks=[depth], max_epochs=6, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        amount: float = 0.3,
        *,
        blocks: str | Sequence[str] | None = None,
        criterion: Criterion = "loss",
        n_batches: int = 4,
        schedule: Schedule = "linear",
        start_epoch: float = 0.0,
        end_epoch: float | None = None,
        every_n_steps: int | None = None,
        stochastic_depth: float = 0.0,
        network: str = "",
        output: str | int | None = None,
        example_inputs: Any = None,
    ) -> None:
        amount = checked_amount(amount)
        start_epoch, end_epoch = checked_epochs(start_epoch, end_epoch, at_once=schedule == "one_shot")
        stochastic_depth = real_number(
            stochastic_depth, "stochastic_depth must be a probability from 0 to below 1", least=0, below=1
        )
        super().__init__(**settings_of(locals()))
        check_schedule(schedule, amount)
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}; got {criterion!r}.")
        check_interval(every_n_steps)
        whole_number(n_batches, "n_batches must be a whole number, 1 or more", least=1)
        if criterion == "influence" and schedule == "one_shot" and start_epoch == 0 < amount:
            raise ValueError(
                "criterion='influence' measures the blocks in the training steps before they leave, and with "
                "schedule='one_shot' and start_epoch=0 there are none: start later, or use criterion='loss'."
            )
        self.amount = amount
        self.blocks = [blocks] if isinstance(blocks, str) else blocks
        self.criterion: Criterion = criterion
        self.n_batches = n_batches
        self.schedule: Schedule = schedule
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.every_n_steps = every_n_steps
        self.stochastic_depth = stochastic_depth
        self.network = network
        self.output = output
        self.example_inputs = example_inputs

        self._ramp: Ramp | None = None
        self._all: tuple[Block, ...] = ()  # the blocks that may leave, with those that have left
        self._left: list[Block] = []  # those of them that are still there
        self._inputs: ExampleInputs | None = None
        self._influence: Influence | None = None
        self._hooks: list[Removable] = []  # of stochastic depth, within a training step
        self._drawn: dict[tuple[int, int], Tensor] = {}  # by block and samples: what they have drawn in this step

    # ------------------------------------------------------------------ what has been reached

    @property
    def removed(self) -> dict[str, int]:
        """The blocks that have left, with their multiply-accumulates for one sample."""
        left = {block.name for block in self._left}
        return {block.name: block.macs for block in self._all if block.name not in left}

    @property
    def share(self) -> float:
        """Share of the blocks' multiply-accumulates that has left."""
        total = sum(block.macs for block in self._all)
        return sum(self.removed.values()) / total if total else 0.0

    @property
    def finished(self) -> bool:
        """Whether all blocks that are to leave have left, so that the rest of the fit is recovery."""
        return self._ramp is not None and self._ramp.finished

    def progress(self) -> Progress:
        ramp = self._ramp
        reached = 0.0 if ramp is None or ramp.last < ramp.start else ramp.progress(ramp.last)
        return Progress(
            fraction=reached if self.amount > 0 else 0.0,
            finished=self.finished or self.amount == 0,
            ramp=True,
            numbers={"blocks_removed": lambda: self.share},
        )

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        if self.amount == 0 and self.stochastic_depth == 0:
            return Effects()
        ramp = None if trainer is None else self._planned(trainer, self.loaded_state)
        finished = ramp is not None and ramp.finished
        return Effects(
            shapes="during_fit" if self.amount > 0 else "never",
            takes_blocks=self.amount > 0,
            looks_at=frozenset() if finished else frozenset({"layers"}),
            begins=None if ramp is None else ramp.start,
            final=None if ramp is None else ramp.last if finished else ramp.end,
        )

    def outline(self, pl_module: LightningModule, inputs: Callable[[], ExampleInputs]) -> Outline | None:
        given = inputs() if self.example_inputs is None else self.example_inputs
        found = find_blocks(resolve_network(pl_module, self.network), given, output=self.output)
        blocks = chosen_blocks(found, self.blocks)
        total = sum(block.macs for block in blocks)
        rows = [[block.name, f"{block.macs:,}", f"{block.macs / found.macs:.1%}"] for block in blocks]
        rows += [[name, "", f"stays: {reason}"] for name, reason in found.refused.items() if self.blocks is None]
        return Outline(
            ["block", "MACs", "share of the network's"],
            rows,
            f"amount={self.amount:g}: at most {self.amount * total:,.0f} of these {total:,} MACs per sample leave; the "
            f"network has {found.macs:,}.",
        )

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.amount > 0:
            # The module and its averages lose the blocks that loaded checkpoints lack, and get others back.
            follow(pl_module)
            for average in averaged_modules(trainer):
                follow_depth(average, pl_module)

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        if self.amount == 0 and self.stochastic_depth == 0:
            return
        refuse_average_in_forward(pl_module, self.network)
        if self.criterion == "loss" and self.amount > 0:
            on_all_ranks(lambda: check_steps(trainer, pl_module))
        network, self._inputs = on_all_ranks(
            lambda: traced_network(trainer, pl_module, self.network, self.example_inputs)
        )
        if state is not None:
            self._all = tuple(Block(**one | {"modules": tuple(one["modules"])}) for one in state["blocks"])
        elif not self._all:
            self._all = on_all_ranks(lambda: self._find(network))
        self._left = [block for block in self._all if _is_there(network, block)]
        self._ramp = self._planned(trainer, state)
        if self.criterion == "influence" and self.amount > 0 and not self.finished:
            self._influence = Influence(network, self._inputs, self._left)
            if state is not None and state["influence"] is not None and rank() == 0:
                self._influence.sums = state["influence"].clone()

    def _find(self, network: nn.Module) -> tuple[Block, ...]:
        assert self._inputs is not None
        found = chosen_blocks(find_blocks(network, self._inputs, output=self.output), self.blocks)
        if self.amount > 0:
            least_important(found, dict.fromkeys((one.name for one in found), 0.0), self.amount)  # refuses small ones
        return found

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> Ramp:
        """Return the ramp of a resumed fit, of an earlier fit, or of this one."""
        kept, earlier = (None, self._ramp) if state is None else (state["ramp"], None)
        return Ramp.of_fit(
            trainer,
            kept,
            earlier,
            start_epoch=self.start_epoch,
            end_epoch=self.start_epoch if self.schedule == "one_shot" else self.end_epoch,
            every_n_steps=self.every_n_steps,
        )

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        if self._ramp is not None:
            self._ramp = self._ramp.followed(
                trainer, moment, end_epoch=self.end_epoch, every_n_steps=self.every_n_steps
            )

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._ramp is None or not self._ramp.take(step):
            return
        if self.amount > 0:
            amount = amount_at(self._ramp.progress(step), self.amount, schedule=self.schedule)
            leaving = self._choose(trainer, pl_module, amount)
            if leaving:
                self._take_out(trainer, pl_module, leaving)
            self._watch_anew(pl_module)
            if self._ramp.finished and step > 0:
                count_anew(trainer, f"{self.share:.0%} of the blocks' multiply-accumulates have left")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.amount > 0 and self._ramp is not None and not self.finished:
            warnings.warn(
                f"The fit ended at step {self._steps}, before the last blocks were to leave at step {self._ramp.end}: "
                f"{self.share:.0%} of the blocks' multiply-accumulates have left, not {self.amount:.0%}.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ an event

    def _choose(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> tuple[Block, ...]:
        """Return the blocks that leave now, the same on all ranks."""
        total = sum(block.macs for block in self._all)
        budget = amount * total * (1 + 1e-9) - sum(self.removed.values())
        fit = [block for block in self._left if block.macs <= budget]
        if not fit:
            return ()
        chosen = torch.zeros(len(self._left), dtype=torch.bool, device=pl_module.device)
        names = [block.name for block in self._left]
        if self.criterion == "loss":
            for block in self._greedy(trainer, pl_module, budget):
                chosen[names.index(block.name)] = True
        else:
            assert self._influence is not None
            scores = self._influence.scores()
            if silent := [name for name in names if scores[name] != scores[name]]:
                raise ValueError(
                    f"The influence of {', '.join(silent)} was not measured, because no training step since the last "
                    f"event, or none at all, has run it: start later, or use criterion='loss'."
                )
            for block in sorted(fit, key=lambda one: scores[one.name]):
                if block.macs <= budget:
                    chosen[names.index(block.name)] = True
                    budget -= block.macs
        chosen = broadcast(chosen)
        return tuple(block for block, leaves in zip(self._left, chosen.tolist(), strict=True) if leaves)

    def _greedy(self, trainer: Trainer, pl_module: LightningModule, budget: float) -> list[Block]:
        """Return the blocks without which the loss rises least for each multiply-accumulate, chosen one by one."""
        network, rest, chosen = resolve_network(pl_module, self.network), list(self._left), list[Block]()
        loss = loss_of_blocks(trainer, pl_module, network, self.n_batches)
        now = loss([])
        if isnan(now):
            raise ValueError(
                "The loss of the training_step is NaN with all blocks, so that nothing says which block matters least: "
                "train with a smaller learning rate, or clip gradients."
            )
        while fit := [block for block in rest if block.macs <= budget]:
            losses = {block.name: loss([*chosen, block]) for block in fit}
            rises = {name: inf if isnan(one) else one - now for name, one in losses.items()}
            best = min(fit, key=lambda block: rises[block.name] / block.macs)
            now, budget = losses[best.name], budget - best.macs
            chosen.append(best)
            rest.remove(best)
        return chosen

    def _take_out(self, trainer: Trainer, pl_module: LightningModule, leaving: Sequence[Block]) -> None:
        """Take blocks out: of the module, the optimizers, averages, and the ranks' wrapper."""
        assert self._inputs is not None
        self._unhook_blocks()
        own = innermost(pl_module)
        network = own.get_submodule(self.network)
        with rewrapped(trainer):
            copies = [*averaged_modules(trainer), *copies_inside(own)]
            parts = [within(copy, self.network) for copy in copies]
            take_out(
                network,
                self._inputs,
                leaving,
                optimizers=trainer.optimizers,
                copies=[part for part in parts if part is not None],
            )
        self._left = [block for block in self._left if block not in leaving]
        rank_zero_info(
            f"{self.name}: {', '.join(block.name for block in leaving)} left the network, and with them and earlier "
            f"ones {self.share:.0%} of the blocks' multiply-accumulates."
        )

    def _watch_anew(self, pl_module: LightningModule) -> None:
        """Measure the influence of the blocks that are left from now on."""
        if self._influence is not None:
            self._unhook_blocks()
            self._influence = None if self.finished else self._influence.of(self._left)

    # ------------------------------------------------------------------ a training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._unhook_blocks()
        if self._ramp is None or self.finished:
            return
        if self._influence is not None and self._steps >= self._ramp.start - self._ramp.interval:
            self._influence.watch()
        if self.stochastic_depth > 0 and self._left:
            network = resolve_network(pl_module, self.network)
            self._hooks += gated(network, self._left, lambda k, x: self._draw(self._left[k], x))

    def _draw(self, block: Block, x: Tensor) -> Tensor:
        """Return 0 for the samples that leave a block out in this step; the branch of others is scaled up."""
        place = self._all.index(block)
        if (place, len(x)) not in self._drawn:  # else the step, or its gradients, run the network again
            keep = 1 - self.stochastic_depth * (place + 1) / len(self._all)
            self._drawn[place, len(x)] = (torch.rand(len(x), generator=self.generator) < keep) / keep
        return self._drawn[place, len(x)].to(x.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._unhook_blocks()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._unhook_blocks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._unhook_blocks()

    def _unhook_blocks(self) -> None:
        self._drawn.clear()
        if self._influence is not None:
            self._influence.stop()
        while self._hooks:
            self._hooks.pop().remove()

    # ------------------------------------------------------------------ checkpoints

    def project_copy(self, module: nn.Module) -> None:
        """Averages hold the values of the weights as they are."""

    def technique_state(self) -> dict[str, Any]:
        return {
            "blocks": [asdict(block) | {"modules": list(block.modules)} for block in self._all],
            "ramp": None if self._ramp is None else self._ramp.state_dict(),
            "influence": None if self._influence is None else self._influence.sums.clone(),
        }

    def synchronize(self) -> None:
        if self._influence is not None:
            self._influence.gather()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.amount > 0:
            keep_metadata(checkpoint, pl_module)


def _is_there(network: nn.Module, block: Block) -> bool:
    """Return whether a block has not left the network."""
    pieces = block.ends.split(".")
    for n in range(1, len(pieces) + 1):
        try:
            found = network.get_submodule(".".join(pieces[:n]))
        except AttributeError:
            return False
        if isinstance(found, StandIn):
            return False
    return True
