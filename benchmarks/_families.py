"""The families that benchmarks/families.py compares: each makes a network for so many bytes of a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from _fitting import AMOUNTS, CLUSTERS, SHARES, bytes_of, clustered_copy, distance, fitting, pruned_copy
from _support import Setting, classifier, fit, initial
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_compress import (
    DistillationModule,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    SlimmableWidth,
    WeightClusteringCallback,
)
from lightning_compress.baselines import Classifier, ResNet20
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.conv_substitution import substitute_convs
from lightning_compress.low_rank import lower_rank

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
WIDTH = 16


def conv_net(width: int) -> nn.Sequential:
    """Five 3x3 convolutions with batch norm and ReLU, two poolings, and a linear layer on the means of the channels."""
    net, before = nn.Sequential(), 1
    for number, outputs in enumerate((width, 2 * width, 2 * width, 4 * width, 4 * width), start=1):
        net.add_module(f"conv{number}", nn.Conv2d(before, outputs, 3, padding=1, bias=False))
        net.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        net.add_module(f"relu{number}", nn.ReLU())
        if number in (1, 3):
            net.add_module(f"pool{number}", nn.MaxPool2d(2))
        before = outputs
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(before, 10))
    return net


def network(dataset: str, width: int = WIDTH) -> nn.Module:
    return conv_net(width) if dataset == "mnist" else ResNet20(width=width)


def untrained(setting: Setting, width: int = WIDTH) -> Classifier:
    """Return a classifier with the seed's initial weights; its memory format trains faster."""
    module = classifier(initial(partial(network, setting.dataset, width), setting), setting, SHAPES[setting.dataset])
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # of nn.Module


@dataclass(frozen=True)
class Bench:
    """What every family gets: the dense network, its data, and a budget.

    Attributes:
        bytes: The most bytes of a file.
        teacher: The dense network, trained on for as long as every family.
        widths: Channels of the first layer with which a dense network fits into each budget, the smallest first.
    """

    setting: Setting
    data: ImageData
    dense: Classifier
    bytes: int
    teacher: Classifier | None = None
    widths: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.setting.dataset]

    def copy(self) -> Classifier:
        return copy.deepcopy(self.dense).train()

    def tuned(self, module: LightningModule, *callbacks: Callback, epochs: int | None = None) -> LightningModule:
        fit(module, self.data, self.setting, epochs=epochs, callbacks=callbacks)
        return module

    def untrained(self, width: int) -> Classifier:
        return untrained(self.setting, width)


# ------------------------------------------------------------------ the families; None: it can't get so small


def pruned(bench: Bench) -> LightningModule | None:
    amount = fitting(bench.bytes, lambda amount: pruned_copy(bench.dense, amount), AMOUNTS)
    return None if amount is None else bench.tuned(bench.copy(), IterativePruningCallback(amount, every_n_steps=20))


def clustered(bench: Bench) -> LightningModule | None:
    k = fitting(bench.bytes, lambda k: clustered_copy(bench.dense, k), CLUSTERS)
    return None if k is None else bench.tuned(bench.copy(), WeightClusteringCallback(k))


def quantized(bench: Bench) -> LightningModule | None:
    # A grid of b bits has 2^b - 1 values, and clusters of as many take as many bits, or fewer.
    bits = fitting(bench.bytes, lambda bits: clustered_copy(bench.dense, 2**bits - 1), [2, 3, 4, 5, 6, 7, 8])
    if bits is None:
        return None
    return bench.tuned(bench.copy(), QuantizationAwareTrainingCallback(bits, activation_bits=None))


def narrow(bench: Bench) -> LightningModule | None:
    width = fitting(bench.bytes, bench.untrained, list(range(1, WIDTH)))
    return None if width is None else bench.tuned(bench.untrained(width), epochs=2 * bench.setting.epochs)


def distilled(bench: Bench) -> LightningModule | None:
    width = fitting(bench.bytes, bench.untrained, list(range(1, WIDTH)))
    if width is None:
        return None
    student = bench.untrained(width)
    bench.tuned(taught(student, bench), epochs=2 * bench.setting.epochs)
    return student


def taught(student: Classifier, bench: Bench) -> DistillationModule:
    assert bench.teacher is not None
    return DistillationModule(student, copy.deepcopy(bench.teacher), temperature=4.0, alpha=0.9, network="network")


_slimmable: dict[int, SlimmableWidth] = {}  # one training for all budgets of a seed


def slimmed(bench: Bench) -> LightningModule | None:
    width = fitting(bench.bytes, bench.untrained, list(range(1, WIDTH)))
    if width is None:
        return None
    if bench.setting.seed not in _slimmable:
        widths = tuple(n / WIDTH for n in bench.widths)
        wrapper = SlimmableWidth(bench.copy(), (*widths, 1.0), network="network", weights="equal")
        bench.tuned(wrapper)
        _slimmable[bench.setting.seed] = wrapper
    thin = _slimmable[bench.setting.seed].extract(width / WIDTH)
    return classifier(thin, bench.setting, bench.shape)


def low_rank(bench: Bench) -> LightningModule | None:
    module = thinner(bench, bench.bytes)
    return None if module is None else bench.tuned(module)


def thinner(bench: Bench, budget: int) -> Classifier | None:
    """Return the dense network with layers of low rank that fit, chosen on its inputs."""
    x = torch.zeros(2, *bench.shape)

    def make(share: float, **options: Any) -> Classifier:
        module = bench.copy()
        lower_rank(module.network, x, budget=share, **options)
        return module

    share = fitting(budget, make, SHARES)
    return None if share is None else make(share, batches=images_of(bench))


def images_of(bench: Bench) -> list[torch.Tensor]:
    return [batch for batch, _ in islice(bench.data.train_dataloader(), 20)]


def separable(bench: Bench, multiplier: int, **options: Any) -> Classifier:
    """Return the dense network with depthwise separable convolutions, as near to its own as their terms allow."""
    module = bench.copy()
    substitute_convs(module.network, torch.zeros(2, *bench.shape), multiplier=multiplier, **options)
    return module


def substituted(bench: Bench) -> LightningModule | None:
    multiplier = fitting(bench.bytes, lambda terms: separable(bench, terms, init="svd"), [1, 2, 3, 4, 5, 6])
    return None if multiplier is None else bench.tuned(separable(bench, multiplier, batches=images_of(bench)))


# ------------------------------------------------------------------ combinations


def few_values(bench: Bench) -> tuple[float, int] | None:
    """Return the amount to prune and the clusters that fit and lose least of the dense network's weights."""
    found = []
    for k in (4, 8, 16, 64):
        make = _pruned_and_clustered(bench, k)
        amount = fitting(bench.bytes, make, AMOUNTS)
        if amount is not None:
            found.append((distance(bench.dense, make(amount)), amount, k))
    return min(found)[1:] if found else None


def _pruned_and_clustered(bench: Bench, k: int) -> Callable[[float], nn.Module]:
    return lambda amount: clustered_copy(pruned_copy(bench.dense, amount), k)


def in_two_parts(bench: Bench, module: LightningModule, amount: float, k: int) -> None:
    """Prune in the first half of the epochs, and cluster what is left at two thirds."""
    epochs = bench.setting.epochs
    pruning = IterativePruningCallback(amount, end_epoch=epochs / 2, every_n_steps=20)
    bench.tuned(module, pruning, WeightClusteringCallback(k, start_epoch=2 * epochs / 3))


def pruned_clustered(bench: Bench) -> LightningModule | None:
    chosen = few_values(bench)
    if chosen is None:
        return None
    module = bench.copy()
    in_two_parts(bench, module, *chosen)
    return module


def pruned_clustered_distilled(bench: Bench) -> LightningModule | None:
    chosen = few_values(bench)
    if chosen is None:
        return None
    module = bench.copy()
    in_two_parts(bench, taught(module, bench), *chosen)
    return module


def slimmed_clustered(bench: Bench) -> LightningModule | None:
    """A student of half the width, taught, then pruned and clustered with the same help."""
    student = bench.untrained(WIDTH // 2)
    bench.tuned(taught(student, bench))
    half = replace(bench, dense=student)
    chosen = few_values(half)
    if chosen is None:
        return None
    in_two_parts(bench, taught(student, bench), *chosen)
    return student


def low_rank_clustered(bench: Bench) -> LightningModule | None:
    """Half of the parameters by low rank, and what is left clustered, with the teacher's help."""
    module = thinner(bench, bytes_of(bench.dense) // 2)
    if module is None:
        return None
    bench.tuned(taught(module, bench))
    chosen = few_values(replace(bench, dense=module))
    if chosen is None:
        return None
    in_two_parts(bench, taught(module, bench), *chosen)
    return module


def separable_clustered(bench: Bench) -> LightningModule | None:
    """Separable convolutions of one term, pruned and clustered, with the teacher's help."""
    module = separable(bench, 1, batches=images_of(bench))
    bench.tuned(taught(module, bench))
    chosen = few_values(replace(bench, dense=module))
    if chosen is None:
        return None
    in_two_parts(bench, taught(module, bench), *chosen)
    return module


Family = Callable[[Bench], LightningModule | None]
FAMILIES: dict[str, Family] = {
    "pruned": pruned,
    "clustered": clustered,
    "quantized": quantized,
    "distilled": distilled,
    "slimmed": slimmed,
    "low rank": low_rank,
    "substituted": substituted,
}
COMBINATIONS: dict[str, Family] = {
    "pruned + clustered": pruned_clustered,
    "pruned + clustered, taught": pruned_clustered_distilled,
    "half as wide + pruned + clustered, taught": slimmed_clustered,
    "low rank + pruned + clustered, taught": low_rank_clustered,
    "separable + pruned + clustered, taught": separable_clustered,
}
CONTROLS: dict[str, Family] = {"narrow, alone": narrow}
