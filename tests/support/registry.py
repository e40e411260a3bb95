"""Canonical settings of every technique: the promises are tested for each entry, so a new technique adds one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)


@dataclass(frozen=True)
class Entry:
    """One technique with settings under which a fit of four epochs exercises all of it."""

    make: Callable[[], Callback]
    nothing: Callable[[], Callback]  # the setting under which it must change nothing at all
    beside: Callable[[], list[Callback]] = list  # other techniques in the same Trainer, after this one
    module: dict[str, Any] = field(default_factory=dict)  # options of SmallModule

    def with_(self, *others: Entry) -> Entry:
        """This technique followed by others."""
        return replace(self, beside=lambda: [other.make() for other in others])


def pruning(**options: Any) -> Entry:
    settings: dict[str, Any] = {"amount": 0.7, "end_epoch": 2.5, "every_n_steps": 5} | options
    return Entry(
        make=lambda: IterativePruningCallback(**settings),
        nothing=lambda: IterativePruningCallback(**(settings | {"amount": 0.0, "stop": None})),
    )


def lasso(**options: Any) -> Entry:
    settings: dict[str, Any] = {"strength": 0.05} | options
    return Entry(
        make=lambda: GroupLassoCallback(**settings),
        nothing=lambda: GroupLassoCallback(**(settings | {"strength": 0.0})),
    )


def clustering(**options: Any) -> Entry:
    settings: dict[str, Any] = {"n_clusters": 5, "start_epoch": 1.5} | options
    return Entry(
        make=lambda: WeightClusteringCallback(**settings),
        nothing=lambda: WeightClusteringCallback(**(settings | {"n_clusters": 0})),
    )


def binary(**options: Any) -> Entry:
    settings: dict[str, Any] = {"start_epoch": 0.5} | options
    return Entry(
        make=lambda: BinaryWeightsCallback(**settings),
        nothing=lambda: BinaryWeightsCallback(**(settings | {"start_epoch": 100.0})),
        module={"activation": F.hardtanh} if "activations" in options else {},
    )


def qat(*bits: Any, **options: Any) -> Entry:
    settings: dict[str, Any] = {"start_epoch": 0.5} | options
    return Entry(
        make=lambda: QuantizationAwareTrainingCallback(*bits, **settings),
        nothing=lambda: QuantizationAwareTrainingCallback(*bits, **(settings | {"start_epoch": 100.0})),
    )


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
    "pruning-neurons": pruning(granularity="neuron", amount=0.5),
    "pruning-neurons-apoz": pruning(granularity="neuron", amount=0.5, criterion="apoz"),
    "pruning-neurons-taylor": pruning(granularity="neuron", amount=0.5, criterion="taylor"),
    "pruning-neurons-fisher": pruning(granularity="neuron", amount=0.5, criterion="fisher"),
    "pruning-neurons-masked": pruning(granularity="neuron", amount=0.5, shrink="never"),
    "pruning-neurons-during-fit": pruning(granularity="neuron", amount=0.5, shrink="during_fit", criterion="taylor"),
    "pruning-stop": pruning(start_epoch=1.0, stop={"monitor": "val_acc", "max_drop": 0.4}, every_n_steps=None),
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
    "pruning-clustering-qat": pruning(amount=0.6).with_(
        clustering(start_epoch=1.0), qat(4, 8, granularity="tensor", start_epoch=2.0)
    ),
}
