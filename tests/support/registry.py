"""Canonical settings of every technique: the promises are tested for each entry, so a new technique adds one line."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule

from examples.own_technique import ClippedWeightsCallback
from lightning_compress import (
    BinaryWeightsCallback,
    BlockPruningCallback,
    ChannelGates,
    ConvSubstitutionCallback,
    DistillationModule,
    EarlyExitHeads,
    GroupLassoCallback,
    IterativePruningCallback,
    LotteryTicketCallback,
    LowRankCallback,
    NuclearNormCallback,
    QuantizationAwareTrainingCallback,
    ScratchCallback,
    SkippableBlocks,
    SlimmableWidth,
    SupermaskCallback,
    WeightClusteringCallback,
    cut,
)
from lightning_compress.core.files import replacing
from support.small import CLASSES, FEATURES, SmallModule

Wrap = Callable[[LightningModule], LightningModule]


def unwrapped(module: LightningModule) -> LightningModule:
    return module


@dataclass(frozen=True)
class Entry:
    """Techniques with settings under which a fit of four epochs exercises all of them: callbacks, wrappers, or both.

    `idle` and `idle_wrap` have the settings under which nothing at all may change.
    """

    callbacks: Callable[[], list[Callback]] = list
    idle: Callable[[], list[Callback]] = list
    wrap: Wrap = unwrapped
    idle_wrap: Wrap = unwrapped
    module: dict[str, Any] = field(default_factory=dict)  # options of SmallModule

    @property
    def wraps(self) -> bool:
        """Whether it has wrappers."""
        return self.wrap is not unwrapped

    @property
    def runs_steps(self) -> bool:
        """Whether it runs the module's own step, and so refuses manual optimization."""
        return self.wraps or any(getattr(one, "criterion", "") == "loss" for one in self.callbacks())

    def with_(self, *others: Entry) -> Entry:
        """These callbacks followed by others, and the wrappers around these wrappers."""

        def wrap(module: LightningModule) -> LightningModule:
            for entry in (self, *others):
                module = entry.wrap(module)
            return module

        return replace(
            self,
            callbacks=lambda: [one for entry in (self, *others) for one in entry.callbacks()],
            wrap=wrap if any(entry.wraps for entry in (self, *others)) else unwrapped,
            module={name: value for entry in (self, *others) for name, value in entry.module.items()},
        )


def technique(kind: Callable[..., Callback], *args: Any, idle: dict[str, Any], **settings: Any) -> Entry:
    """A callback, and the settings that make it do nothing."""
    return Entry(lambda: [kind(*args, **settings)], lambda: [kind(*args, **(settings | idle))])


def pruning(**options: Any) -> Entry:
    settings: dict[str, Any] = {"amount": 0.7, "end_epoch": 2.5, "every_n_steps": 3} | options
    return technique(IterativePruningCallback, idle={"amount": 0.0, "stop": None}, **settings)


def ticket(**options: Any) -> Entry:
    settings: dict[str, Any] = {"rate": 0.45, "rounds": 2, "round_epochs": 1.5, "rewind_to": 0.5} | options
    return technique(LotteryTicketCallback, idle={"rate": 0.0}, **settings)


def lasso(**options: Any) -> Entry:
    settings: dict[str, Any] = {"strength": 0.05} | options
    return technique(GroupLassoCallback, idle={"strength": 0.0}, **settings)


def clustering(**options: Any) -> Entry:
    settings: dict[str, Any] = {"n_clusters": 5, "start_epoch": 1.5} | options
    return technique(WeightClusteringCallback, idle={"n_clusters": 0}, **settings)


def binary(**options: Any) -> Entry:
    settings: dict[str, Any] = {"start_epoch": 0.5} | options
    entry = technique(BinaryWeightsCallback, idle={"start_epoch": 100.0}, **settings)
    return replace(entry, module={"activation": F.hardtanh} if "activations" in options else {})


def qat(*bits: Any, **options: Any) -> Entry:
    settings: dict[str, Any] = {"start_epoch": 0.5} | options
    return technique(QuantizationAwareTrainingCallback, *bits, idle={"start_epoch": 100.0}, **settings)


def supermask(method: str = "edge_popup", **options: Any) -> Entry:
    settings: dict[str, Any] = {"amount": 0.4, "method": method} | options
    return technique(SupermaskCallback, idle={"amount": 0.0}, **settings)


def distillation(**options: Any) -> Entry:
    settings: dict[str, Any] = {"temperature": 4.0, "alpha": 0.6} | options

    def wrap(module: LightningModule, **changed: Any) -> LightningModule:
        return DistillationModule(module, small_teacher(), **(settings | changed))

    idle = {"alpha": 0.0, "hints": ()}
    return Entry(wrap=wrap, idle_wrap=partial(wrap, **idle))


def small_teacher() -> SmallModule:
    """Always the same weights, whatever the random state, which stays as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        return SmallModule()


def exits(layers: Sequence[str] = ("net.norm", "net.hidden"), **options: Any) -> Entry:
    def wrap(module: LightningModule, layers: Sequence[str] = layers) -> LightningModule:
        return EarlyExitHeads(module, layers, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES), **options)

    return Entry(wrap=wrap, idle_wrap=partial(wrap, layers=()))


def widths(widths: Sequence[float] = (0.25, 0.5, 1.0), **options: Any) -> Entry:
    def wrap(module: LightningModule, widths: Sequence[float] = widths) -> LightningModule:
        return SlimmableWidth(module, widths, example_inputs=torch.zeros(2, FEATURES), **options)

    return Entry(wrap=wrap, idle_wrap=partial(wrap, widths=(1.0,)))


def channel_gates(**options: Any) -> Entry:
    def wrap(module: LightningModule, **changed: Any) -> LightningModule:
        return ChannelGates(module, example_inputs=torch.zeros(2, FEATURES), **(options | changed))

    return Entry(wrap=wrap, idle_wrap=partial(wrap, share=1.0))


def block_gates(**options: Any) -> Entry:
    settings: dict[str, Any] = {"target": 0.6, "weight": 8.0, "budget": "per_gate", "noise": True} | options

    def wrap(module: LightningModule, **changed: Any) -> LightningModule:
        return SkippableBlocks(module, example_inputs=torch.zeros(2, FEATURES), **(settings | changed))

    return Entry(wrap=wrap, idle_wrap=partial(wrap, blocks=()), module={"residual": True})


def depth(**options: Any) -> Entry:
    settings: dict[str, Any] = {"amount": 0.5, "end_epoch": 2.5, "every_n_steps": 3, "n_batches": 2} | options
    entry = technique(BlockPruningCallback, idle={"amount": 0.0, "stochastic_depth": 0.0}, **settings)
    return replace(entry, module={"residual": True})


def low_rank(**options: Any) -> Entry:
    settings: dict[str, Any] = {"n_batches": 4, "rank": None} | options
    return technique(LowRankCallback, idle={"budget": 1.0, "rank": None, "energy": None}, **settings)


def nuclear_norm(**options: Any) -> Entry:
    settings: dict[str, Any] = {"strength": 0.5, "every_n_steps": 3} | options
    return technique(NuclearNormCallback, idle={"strength": 0.0}, **settings)


def conv_blocks(block: str = "separable", **options: Any) -> Entry:
    entry = technique(ConvSubstitutionCallback, block, idle={"target": ()}, **({"n_batches": 2} | options))
    return replace(entry, module={"residual": True})


@cache
def structure_file(*, thin: bool, residual: bool = False) -> str:
    """The file of a small network of which 60 % of each weight are zero, or half of the hidden channels have left."""
    folder = Path(tempfile.gettempdir()) / f"lightning_compress_tests_{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        module = SmallModule(residual=residual)
    if thin:
        cut(module, torch.zeros(2, FEATURES), keep={"net.hidden": list(range(0, 16, 2))})
    for weight in () if thin else (module.net.conv.weight, module.net.hidden.weight, module.net.head.weight):
        weight.data[weight.abs() < weight.abs().flatten().quantile(0.6)] = 0.0
    with replacing(path := folder / f"structure-{thin}-{residual}.ckpt") as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
    return str(path)


def scratch(*, thin: bool = False, residual: bool = False, **options: Any) -> Entry:
    settings: dict[str, Any] = {"structure": structure_file(thin=thin, residual=residual)} | options
    entry = technique(ScratchCallback, idle={"structure": None}, **settings)
    return replace(entry, module={"residual": True} if residual else {})


def clipped(**options: Any) -> Entry:
    return technique(ClippedWeightsCallback, idle={"limit": 1e9}, **({"limit": 0.1} | options))


REGISTRY: dict[str, Entry] = {
    "pruning": pruning(),
    "pruning-layer-random": pruning(criterion="random", scope="layer", schedule="linear"),
    "pruning-one-shot": pruning(schedule="one_shot", start_epoch=1.0, end_epoch=None),
    "pruning-regrow": pruning(regrow=True, schedule="cosine"),
    "pruning-taylor": pruning(criterion="taylor"),
    "pruning-obd": pruning(criterion="obd"),
    "pruning-fisher": pruning(criterion="fisher"),
    "pruning-ewc": pruning(criterion="ewc"),
    "pruning-si": pruning(criterion="si"),
    "pruning-mas": pruning(criterion="mas"),
    "pruning-movement": pruning(criterion="movement"),
    "pruning-same-sign-regrow": pruning(criterion="large_final_same_sign", regrow=True, scope="layer"),
    "pruning-neurons": pruning(granularity="neuron", amount=0.5),
    "pruning-neurons-apoz": pruning(granularity="neuron", amount=0.5, criterion="apoz"),
    "pruning-neurons-taylor": pruning(granularity="neuron", amount=0.5, criterion="taylor"),
    "pruning-neurons-fisher": pruning(granularity="neuron", amount=0.5, criterion="fisher"),
    "pruning-neurons-masked": pruning(granularity="neuron", amount=0.5, shrink="never"),
    "pruning-neurons-during-fit": pruning(granularity="neuron", amount=0.5, shrink="during_fit", criterion="taylor"),
    "pruning-stop": pruning(start_epoch=1.0, stop={"monitor": "val_acc", "max_drop": 0.4}, every_n_steps=None),
    "pruning-ticket": ticket(),
    "pruning-ticket-init-rates": ticket(
        rate={"net.head": 0.3, "*": 0.5},
        rewind="init",
        rewind_to=0.0,
        round_epochs=1,
        restart="reinit",
        signs="random",
    ),
    "pruning-ticket-learning-rate": ticket(rewind="learning_rate", criterion="taylor"),
    "pruning-ticket-fine-tuning": ticket(rewind=None, round_epochs=None, optimizer_state="keep"),
    "pruning-ticket-neurons": ticket(granularity="neuron", rate=0.3, optimizer_state="rewind"),
    "group-lasso": lasso(),
    "group-lasso-shape-proximal": lasso(granularity="shape", proximal=True),
    "group-lasso-units-shrink": lasso(granularity="group", proximal=True, strength=0.3, shrink="on_fit_end"),
    "clustering": clustering(),
    "clustering-by-pattern": clustering(n_clusters={"net.conv": 6, "*": 3}, start_epoch=0.0, init="density"),
    "clustering-global-sum": clustering(scope="global", gradient="sum", target=["net.hidden", "net.head"]),
    "pruning-then-clustering": pruning(amount=0.6).with_(clustering()),
    "clustering-then-pruning": clustering(start_epoch=1.0).with_(pruning(amount=0.6)),
    "neurons-during-fit-then-clustering": pruning(granularity="neuron", shrink="during_fit").with_(clustering()),
    "binary-deterministic": binary(start_epoch=0.0, lr_scale="glorot"),
    "binary-stochastic": binary(mode="stochastic"),
    "binary-xnor-activations": binary(scaling="mean", activations=True),
    "pruning-then-binary": pruning(amount=0.6, end_epoch=1.5).with_(binary(start_epoch=2.0, mode="stochastic")),
    "binary-then-pruning-taylor": binary(scaling="mean").with_(pruning(amount=0.6, criterion="taylor")),
    "clustering-beside-binary": clustering(n_clusters={"net.head": 5}).with_(binary(exclude="net.head")),
    "qat": qat(8, 4),
    "qat-4bit-weights-only": qat({"net.hidden": 2, "*": 4}, None, start_epoch=0.0),
    "supermask": supermask(),
    "supermask-bernoulli-dynamic": supermask(
        "bernoulli", init="uniform", rescale="dynamic", others="trained", exclude="net.head"
    ),
    "supermask-signed": supermask("signed", init="signed_constant", rescale="fan", seed=5),
    "supermask-beside-pruning": supermask(target="net.hidden", others="trained").with_(pruning(exclude="net.hidden")),
    "supermask-beside-codebook-exits": supermask(target="net.hidden", exclude="net.norm").with_(
        clustering(n_clusters={"net.head": 5}), exits()
    ),
    "distillation": distillation(),
    "distillation-hints-scheduled": distillation(
        temperature={"start": 6.0, "end": 1.0, "schedule": "cosine"},
        hints=[{"student": "net.conv", "teacher": "net.conv", "regressor": True, "channel_dim": 1}],
    ),
    "distillation-twice": distillation().with_(distillation(loss="logit_regression", alpha=0.3)),
    "pruning-distillation": pruning().with_(distillation()),
    "pruning-neurons-during-fit-distillation": pruning(granularity="neuron", amount=0.5, shrink="during_fit").with_(
        distillation(
            hints=[{"student": "net.norm", "teacher": "net.norm", "loss": "attention_transfer", "weight": 10.0}]
        )
    ),
    "pruning-clustering-qat": pruning(amount=0.6).with_(
        clustering(start_epoch=1.0), qat(4, 8, granularity="tensor", start_epoch=2.0)
    ),
    "exits": exits(),
    "exits-frozen": exits(train="frozen"),
    "exits-rising-equilibrium": exits(weights="rising", gradient="equilibrium", distill=0.5),
    "distillation-exits": distillation().with_(exits()),
    "pruning-exits": pruning().with_(exits()),
    "pruning-neurons-exits": pruning(granularity="neuron", amount=0.5).with_(exits()),
    "pruning-neurons-during-fit-exits": pruning(granularity="neuron", amount=0.5, shrink="during_fit").with_(exits()),
    "clustering-qat-exits": clustering(start_epoch=1.0).with_(
        qat(4, 8, granularity="tensor", start_epoch=2.0), exits()
    ),
    "widths": widths(),
    "widths-statistics": widths(norms="statistics", distill=0.0, weights="rising"),
    "widths-universal": widths(universal=True),
    "distillation-widths": distillation().with_(widths((0.5,))),
    "exits-widths": exits().with_(widths((0.5,), norms="statistics")),
    "pruning-widths": pruning().with_(widths((0.5,))),
    "clustering-qat-widths": clustering(start_epoch=1.0).with_(
        qat(4, 8, granularity="tensor", start_epoch=2.0), widths((0.5,))
    ),
    "channel-gates": channel_gates(),
    "distillation-channel-gates": distillation().with_(channel_gates(share=0.3, end_epoch=1.5)),
    "channel-gates-q-learning": channel_gates(train="q_learning"),
    "pruning-channel-gates": pruning().with_(channel_gates()),
    "clustering-qat-channel-gates": clustering(start_epoch=1.0).with_(
        qat(4, 8, granularity="tensor", start_epoch=2.0), channel_gates()
    ),
    "block-gates": block_gates(),
    "block-gates-recurrent-total": block_gates(gate="recurrent", budget="total", noise=False),
    "block-gates-policy": block_gates(gate="policy", end_epoch=3.0),
    "block-gates-hybrid": block_gates(train="hybrid"),
    "block-gates-policy-reinforce": block_gates(train="reinforce", gate="policy"),
    "distillation-block-gates": distillation().with_(block_gates()),
    "pruning-clustering-block-gates": pruning(amount=0.6).with_(clustering(start_epoch=1.0), block_gates()),
    "depth": depth(amount=1.0),
    "depth-influence-stochastic": depth(
        criterion="influence", schedule="one_shot", start_epoch=1.5, end_epoch=None, stochastic_depth=0.4
    ),
    "depth-distillation": depth().with_(distillation()),
    "low-rank": low_rank(budget=0.45, cost="macs"),
    "low-rank-plain": low_rank(rank={"net.hidden": 4}, data="none"),
    "low-rank-distillation": low_rank().with_(distillation()),
    "low-rank-then-pruning": low_rank().with_(pruning(amount=0.6)),
    "low-rank-then-clustering-qat": low_rank().with_(
        clustering(start_epoch=1.0), qat(4, 8, granularity="tensor", start_epoch=2.0)
    ),
    "nuclear-norm": nuclear_norm(),
    "conv-blocks": conv_blocks(),
    "conv-blocks-ghost-svd": conv_blocks("ghost", init="svd"),
    "conv-blocks-fire-distillation": conv_blocks("fire", init="random").with_(distillation()),
    "scratch": scratch(),
    "scratch-random": scratch(mask="random"),
    "scratch-thin-computation": scratch(thin=True, budget="computation"),
    "scratch-distillation": scratch().with_(distillation()),
    "scratch-then-clustering-qat": scratch().with_(
        clustering(start_epoch=1.0), qat(4, 8, granularity="tensor", start_epoch=2.0)
    ),
    "own-technique": clipped(),
}
