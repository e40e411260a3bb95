"""What is said and refused: at the fit's start, of the right thing, and in names that meet nobody else's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from support.small import BATCH, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    DistillationModule,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.report.renamed import TARGETS

ROOT = Path(__file__).parents[2]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(*plain().dataset.tensors, strict=True))


def test_a_loader_without_length_is_named_where_epochs_are_limited() -> None:
    trainer = quiet_trainer(callbacks=[IterativePruningCallback(0.5)], max_epochs=3)
    with pytest.raises(ValueError, match=r"loader has no length, so that max_epochs=3 .*max_steps=\.\.\."):
        trainer.fit(SmallModule(), DataLoader(Stream(), BATCH))


class Busy(Callback):
    """A callback of the user's, whose attributes are its own."""

    proximal = regrow = finished = True
    criterion, amount, strength, target, latent = "magnitude", 0.9, 1.0, "net.*", {}
    _stop = scope = shrink = "during_fit"


@pytest.mark.parametrize(
    "technique",
    [
        lambda: IterativePruningCallback(0.5),
        lambda: IterativePruningCallback(0.5, granularity="neuron"),
        lambda: GroupLassoCallback(0.1, proximal=True),
        lambda: WeightClusteringCallback(4),
        lambda: BinaryWeightsCallback(),
        lambda: QuantizationAwareTrainingCallback(),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_of_the_users_is_not_judged_by_its_attributes(
    technique: Callable[[], Callback], first: bool
) -> None:
    callbacks = [Busy(), technique()]
    quiet_trainer(callbacks=callbacks if first else callbacks[::-1], max_epochs=1).fit(SmallModule(), shuffled())


def test_logs_of_the_users_module_meet_none_of_ours() -> None:
    names = ("zeros", "clusters", "weight_bits", "sparsity", "distillation_loss", "alpha", "saturated", "clipped")

    class Logging(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for name in names:
                self.log(name, -1.0, on_step=True, on_epoch=False)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("bits_per_weight", -1.0)

    callbacks: list[Callback] = [
        IterativePruningCallback(0.5, target="net.conv"),
        QuantizationAwareTrainingCallback(4, None, target="net.hidden"),
        WeightClusteringCallback(4, target="net.head"),
    ]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2, log_every_n_steps=1)
    trainer.fit(DistillationModule(Logging(), SmallModule(), alpha=0.5), shuffled(), plain())
    logged = trainer.callback_metrics
    assert all(float(logged[name]) == -1.0 for name in (*names, "bits_per_weight"))
    ours = {name for name in logged if name.startswith("compress/")}
    assert ours == {
        f"compress/{name}"
        for name in ("sparsity", "weight_bits", "clipped", "zeros", "bits_per_weight", "clusters", "distillation_loss")
    }


# ---------------------------------------------------------------------- refusals at the start of a fit


class Count(Callback):
    steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("order", [1, -1])
def test_pruning_that_outlasts_the_start_of_binary_weights_is_refused_before_the_first_step(order: int) -> None:
    count = Count()
    callbacks = [IterativePruningCallback(0.5, end_epoch=3.0), BinaryWeightsCallback(start_epoch=2.0)]
    with pytest.raises(ValueError, match="still prunes"):
        quiet_trainer(callbacks=[count, *callbacks[::order]]).fit(SmallModule(), shuffled(), plain())
    assert count.steps == 0


def test_layers_without_a_binary_form_are_refused_before_the_first_step() -> None:
    class Transposed(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net.conv = nn.ConvTranspose1d(1, 6, 3, padding=1)

    count = Count()
    binary = BinaryWeightsCallback(scaling="mean", activations=["net.*"], start_epoch=2.0)
    with pytest.raises(ValueError, match=r"net\.conv is a ConvTranspose1d"):
        quiet_trainer(callbacks=[count, binary]).fit(Transposed(), shuffled(), plain())
    assert count.steps == 0


class Words(LightningModule):
    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(10, 6, sparse=sparse), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def words() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*(torch.randint(0, n, (64,), generator=generator) for n in (10, 4))), batch_size=16)


@pytest.mark.parametrize(
    "technique",
    [
        lambda **target: WeightClusteringCallback(4, start_epoch=1.0, **target),
        lambda **target: BinaryWeightsCallback(scaling="mean", start_epoch=1.0, **target),
        lambda **target: GroupLassoCallback(0.1, **target),
    ],
)
def test_sparse_gradients_are_refused_by_name_where_all_of_a_gradient_is_needed(technique: Any) -> None:
    count = Count()
    with pytest.raises(ValueError, match=r"embedding is an Embedding\(sparse=True\).* use sparse=False, or exclude it"):
        quiet_trainer(callbacks=[count, technique(target=["embedding", "head"])]).fit(Words(), words())
    assert count.steps == 0
    quiet_trainer(callbacks=[technique()], max_epochs=2).fit(Words(), words())  # which is no target by default


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_embeddings_with_sparse_gradients_are_pruned(criterion: Any) -> None:
    module = Words()
    pruning = IterativePruningCallback(0.5, criterion=criterion, start_epoch=1.0, target=["embedding", "head"])
    quiet_trainer(callbacks=[pruning], max_epochs=3).fit(module, words())
    assert sum(int((one.weight == 0).sum()) for one in (module.embedding, module.head)) == 42


@pytest.mark.parametrize(
    "behind",
    [
        lambda **target: [],
        lambda **target: [QuantizationAwareTrainingCallback(4, None, start_epoch=1.0, **target)],
        lambda **target: [BinaryWeightsCallback(start_epoch=2.0, **target)],
    ],
)
def test_a_pruned_embedding_trains_alike_with_sparse_and_with_dense_gradients(behind: Any) -> None:
    ends = []
    for sparse in (True, False):
        module, target = Words(sparse=sparse), {"target": ["embedding", "head"]}
        pruning = IterativePruningCallback(0.5, end_epoch=2.0, **target)
        quiet_trainer(callbacks=[pruning, *behind(**target)], max_epochs=4).fit(module, words())
        ends.append(module.embedding.weight.detach())
    torch.testing.assert_close(*ends)


class Waves(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.wave, self.head = nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wave(x.to(torch.complex64)).abs())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(F.one_hot(batch[0] % 6, 6)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "technique",
    [
        lambda **options: IterativePruningCallback(0.5, start_epoch=1.0, **options),
        lambda **options: QuantizationAwareTrainingCallback(8, None, start_epoch=1.0, **options),
        lambda **options: BinaryWeightsCallback(start_epoch=1.0, **options),
        lambda **options: WeightClusteringCallback(4, start_epoch=1.0, **options),
        lambda **options: GroupLassoCallback(0.1, **options),
    ],
)
def test_complex_weights_are_refused_by_name_before_the_first_step(technique: Any) -> None:
    count = Count()
    with pytest.raises(ValueError, match=r"wave\.weight is torch\.complex64, and .* is for real weights: exclude it"):
        quiet_trainer(callbacks=[count, technique()]).fit(Waves(), words())
    assert count.steps == 0
    quiet_trainer(callbacks=[technique(exclude="wave")], max_epochs=2).fit(Waves(), words())


def test_what_texts_cite_exists() -> None:
    texts = [
        *(ROOT / "lightning_compress").rglob("*.py"),
        *(ROOT / "lightning_compress").rglob("*.md"),
        *ROOT.glob("*.md"),
    ]
    missing = []
    for text in texts:
        for name in set(re.findall(r"lightning_compress(?:\.\w+)+", text.read_text())):
            parts = name.split(".")
            for n in range(len(parts), 0, -1):
                try:
                    found: Any = importlib.import_module(".".join(parts[:n]))
                except ImportError:
                    continue
                break
            for attribute in parts[n:]:
                found = getattr(found, attribute, None)
            if found is None and n > 1 and name not in TARGETS:  # what lies at the top may be a key of a state dict
                missing.append((text.name, name))
    assert missing == []
