"""What a network is traced with when the user named nothing; and that the data do not notice."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.baselines.loader import RandomShift, TensorLoader
from lightning_compress.trainer.inputs import inputs_of

N, D = 24, 8


class Seeing(LightningModule):
    """Keeps what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 4))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        self.seen.append(x.clone())
        return self(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def rows() -> Tensor:
    return torch.arange(float(N * D)).view(N, D) / (N * D)


class Augmented(Dataset[Tensor]):
    """With generators of its own, a counter and a cache."""

    def __init__(self) -> None:
        self.rngs: Any = {
            "numpy": np.random.default_rng(0),
            "old": np.random.RandomState(0),
            "python": random.Random(0),
        }
        self.count = 0
        self.cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        self.count += 1
        noise = self.rngs["numpy"].random() + self.rngs["old"].rand() + self.rngs["python"].random() + random.random()
        self.cache.setdefault(index, rows()[index] + self.count)
        return self.cache[index] + noise


class Streamed(IterableDataset[Tensor]):
    """Another order in each epoch, in lists and arrays that are shuffled in place."""

    def __init__(self) -> None:
        self.epoch = 0
        self.order = list(range(N))
        self.places, self.tensor = np.arange(N), torch.arange(N)
        self.rng = torch.Generator()

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[Tensor]:
        self.epoch += 1
        random.Random(self.epoch).shuffle(self.order)
        np.random.default_rng(self.epoch).shuffle(self.places)
        self.tensor.copy_(self.tensor[torch.randperm(N, generator=self.rng)])
        for i in range(N):
            yield rows()[self.order[i]] + rows()[self.places[i]] + rows()[self.tensor[i]] + self.epoch


class Itself:
    """Its own iterator, as old loaders are."""

    def __init__(self) -> None:
        self.at = self.rounds = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        self.at = 0
        self.rounds += 1
        return self

    def __next__(self) -> Tensor:
        if self.at == 3:
            raise StopIteration
        self.at += 1
        return rows()[self.at * 4 : self.at * 4 + 4] + self.rounds


class Stateful(Itself):
    def state_dict(self) -> dict[str, int]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("no state is loaded into it")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Any] = {
    "global draws": lambda: DataLoader(TensorDataset(rows()), 4, shuffle=True),
    "a generator": lambda: DataLoader(TensorDataset(rows()), 4, shuffle=True, generator=seeded()),
    "a sampler": lambda: DataLoader(TensorDataset(rows()), 4, sampler=RandomSampler(rows(), generator=seeded())),
    "a dataset with generators": lambda: DataLoader(Augmented(), 4),
    "a stream": lambda: DataLoader(Streamed(), 4),
    "workers that stay": lambda: DataLoader(
        TensorDataset(rows()), 4, shuffle=True, num_workers=1, persistent_workers=True, generator=seeded()
    ),
    "its own iterator": Itself,
    "a stateful one": Stateful,
    "tensors in memory": lambda: TensorLoader(
        rows()[:, None, None], torch.arange(N), batch_size=4, shuffle=True, augment=RandomShift(1)
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_training_data_do_not_notice_that_a_batch_was_looked_at(kind: str) -> None:
    """The run with a callback that traces sees, in three epochs, the batches of the run without it."""
    seen = []
    for callbacks in ([], [IterativePruningCallback(0.0, granularity="neuron"), lasso(shrink="on_fit_end")]):
        torch.manual_seed(5)
        np.random.seed(5)  # what users' transforms draw from
        random.seed(5)
        module = Seeing()
        quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module, LOADERS[kind]())
        seen.append(torch.cat(module.seen))
    assert torch.equal(*seen)


def lasso(**options: Any) -> GroupLassoCallback:
    return GroupLassoCallback(1e-3, granularity="group", proximal=True, **options)


def test_data_that_can_not_be_looked_at_without_a_loss_are_refused() -> None:
    def batches() -> Iterator[Tensor]:
        yield from rows().split(4)

    class Held(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.rows = iter(rows())

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    for data, kind in ((batches(), "generator"), (DataLoader(Held(), 4), "generator|iterator|map")):
        callback = IterativePruningCallback(0.5, granularity="neuron", every_n_steps=1)
        with pytest.raises(ValueError, match=rf"a running .*({kind}).*example_inputs= replaces them"):
            quiet_trainer(max_epochs=1, max_steps=3, callbacks=[callback]).fit(Seeing(), data)
    module = Seeing()
    callback = IterativePruningCallback(0.5, granularity="neuron", example_inputs=rows()[:2], end_epoch=0.5)
    quiet_trainer(max_epochs=1, limit_train_batches=4, callbacks=[callback]).fit(module, batches())
    assert torch.equal(torch.cat(module.seen), rows()[: len(module.seen) * 4])


class Counted(Itself):
    looks = 0

    def __iter__(self) -> Any:
        type(self).looks += 1
        return super().__iter__()


def test_a_batch_is_looked_at_once_in_a_fit_and_anew_in_the_next() -> None:
    pruning = IterativePruningCallback(0.5, granularity="neuron", shrink="during_fit", end_epoch=1.0, every_n_steps=1)
    looks = []
    for callbacks in ([], [pruning, lasso(shrink="on_fit_end")]):
        module, trainer = Seeing(), quiet_trainer(max_epochs=2, callbacks=callbacks)
        for epochs in (2, 4):
            Counted.looks, trainer.fit_loop.max_epochs = 0, epochs
            trainer.fit(module, Counted())
            looks.append(Counted.looks)
    assert looks[2:] == [looks[0] + 1, looks[1] + 1]


# ------------------------------------------------------------------ what a network is called with


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)


class One(Takes):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Two(Takes):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a + b)


class Optional(Takes):
    def forward(self, a: Tensor, b: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        return self.net(a)


class Positions(Takes):
    def forward(self, *args: Tensor) -> Tensor:
        return self.net(args[0] + args[1])


class Keywords(Takes):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(inputs["a"] + inputs.get("b", 0))


class Strict(Takes):
    def forward(self, **inputs: Tensor) -> Tensor:
        (x,) = inputs.values()
        return self.net(x)


class Needs(Takes):
    def forward(self, a: Tensor, labels: Tensor) -> Tensor:
        return self.net(a) * labels[:, None]


class Dictionary(Takes):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["a"])


class Pair(Takes):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        a, b = pair
        return self.net(a + b)


A, B, Y = torch.ones(2, 4), torch.zeros(2, 4), torch.arange(2)


@pytest.mark.parametrize(
    ("network", "batch", "expected"),
    [
        (One, A, A),
        (One, [A, Y], A),
        (One, (A, B, Y), A),
        (One, {"x": A, "y": Y}, {"x": A}),
        (Two, [A, B, Y], (A, B)),
        (Two, [[A, B], Y], (A, B)),
        (Two, {"a": A, "b": B, "label": Y}, {"a": A, "b": B}),
        (Two, [{"a": A, "b": B}, Y], {"a": A, "b": B}),
        (Two, UserDict(a=A, b=B, label=Y), {"a": A, "b": B}),
        (Optional, [A, Y], A),
        (Optional, {"a": A, "labels": Y}, {"a": A}),
        (Positions, [A, B, Y], (A, B)),
        (Keywords, {"a": A, "b": B, "labels": Y}, {"a": A, "b": B}),
        (Keywords, [{"a": A}, Y], {"a": A}),
        (Strict, {"anything": A, "y": Y}, {"anything": A}),
        (Needs, {"a": A, "labels": Y}, {"a": A, "labels": Y}),
        (Dictionary, {"a": A, "y": Y}, ({"a": A, "y": Y},)),
        (Pair, [[A, B], Y], ([A, B],)),
    ],
)
def test_the_inputs_are_told_from_the_forward(network: type[nn.Module], batch: Any, expected: Any) -> None:
    assert_same(inputs_of(batch, network()), expected)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found is expected
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    else:
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("batch", [[A[:, :2], Y], {"b": A}, {"a": A[:, :2]}, [], "text", [Y]])
@pytest.mark.parametrize("network", [One, Two, Keywords, Positions])
def test_what_can_not_be_told_names_example_inputs(network: type[nn.Module], batch: Any) -> None:
    with pytest.raises(ValueError, match=rf"yields .*no inputs of {network.__name__} were found.*pass example_inputs="):
        inputs_of(batch, network())


def test_a_guess_leaves_the_network_as_it_is() -> None:
    class Counting(Takes):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(3), 0

        def forward(self, *args: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(F.dropout(self.net(args[0] + args[1])))

    network = Counting()
    torch.manual_seed(0)
    inputs_of([A, B, Y], network)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert network.calls == network.norm.num_batches_tracked == 0
    assert network.training


@pytest.mark.parametrize("style", ["positions", "keywords", "two"])
def test_neurons_are_pruned_whatever_the_forward_takes(style: str) -> None:
    """To the very channels that leave a network with a plain forward."""

    class Plain(Seeing):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.logits(batch), batch["y"] if isinstance(batch, dict) else batch[-1])

        def logits(self, batch: Any) -> Tensor:
            return self(batch[0])

    class Star(Plain):
        def forward(self, *args: Tensor) -> Tensor:
            return self.net(*args)

    class Named(Plain):
        def forward(self, **inputs: Tensor) -> Tensor:
            return self.net(inputs["x"])

        def logits(self, batch: Any) -> Tensor:
            return self(**batch)

    class Halves(Plain):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(torch.cat([a, b], 1))

        def logits(self, batch: Any) -> Tensor:
            return self(batch[0], batch[1])

    x, y = torch.randn(N, D, generator=seeded()), torch.arange(N) % 4
    kind, data = {
        "positions": (Star, list(zip(x, y, strict=True))),
        "keywords": (Named, [{"x": one, "y": label} for one, label in zip(x, y, strict=True)]),
        "two": (Halves, list(zip(x[:, : D // 2], x[:, D // 2 :], y, strict=True))),
    }[style]
    kept = []
    for made, samples in ((Plain, list(zip(x, y, strict=True))), (kind, data)):
        torch.manual_seed(0)
        module: Any = made()
        callback = IterativePruningCallback(0.5, granularity="neuron", end_epoch=1.0)
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module, DataLoader(samples, 8))  # type: ignore[arg-type]
        kept.append(module.net[0].weight)
    assert len(kept[0]) == 8
    torch.testing.assert_close(*kept)
