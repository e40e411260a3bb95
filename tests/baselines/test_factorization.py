from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.ranks import RankPair
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import (
    DistillationModule,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
    load_compressed,
    save_compressed,
)
from lightning_compress.baselines import NNMF, DotProduct, MatrixFactorization, Ratings, RidgeBiases

USERS, ITEMS = 30, 20
SMALL: dict[str, Any] = {"width": 3, "products": 4, "hidden": (5, 6)}
TABLES = ["network.user*", "network.item*"]


def ratings(**kwargs: Any) -> Ratings:
    return Ratings(users=USERS, items=ITEMS, count=300, **kwargs)


def nnmf(**kwargs: Any) -> MatrixFactorization:
    seed_everything(0, verbose=False)
    return MatrixFactorization(NNMF(USERS, ITEMS, **SMALL), **{"lr": 0.01, "regularization": 1.0, **kwargs})


def training_part() -> tuple[Tensor, Tensor]:
    data = ratings()
    data.setup()
    ((pairs, values),) = data.train_dataloader()
    return pairs, values


def test_the_network_has_the_sizes_of_the_paper_and_computes_its_formula() -> None:
    network = NNMF(943, 1682)
    latent = sum(p.numel() for name, p in network.named_parameters() if network.is_latent(name))
    assert latent == (10 + 60) * (943 + 1682)
    assert sum(p.numel() for p in network.mlp.parameters()) == 81 * 50 + 51 * 50 + 51 * 50 + 51
    bound = 4 * (6 / 130) ** 0.5
    assert 0.98 * bound < network.mlp.fc1.weight.abs().max() <= bound
    assert 0.08 < network.user.weight.std() < 0.1
    network = NNMF(USERS, ITEMS, width=2, products=3, factors=2, hidden=(4,))
    weights = network.state_dict()
    for user, item in ((0, 0), (29, 19), (4, 7)):
        inner = weights["user_products.weight"][user] * weights["item_products.weight"][item]
        seen = torch.cat([weights["user.weight"][user], weights["item.weight"][item], inner.view(3, 2).sum(1)])
        hidden = torch.sigmoid(weights["mlp.fc1.weight"] @ seen + weights["mlp.fc1.bias"])
        expected = weights["mlp.fc2.weight"] @ hidden + weights["mlp.fc2.bias"]
        assert torch.allclose(network(torch.tensor([[user, item]])), expected)


@pytest.mark.parametrize("sizes", [{"width": 0}, {"products": 0}])
def test_either_kind_of_vector_may_be_missing(sizes: dict[str, int]) -> None:
    assert NNMF(USERS, ITEMS, **sizes)(torch.zeros(3, 2, dtype=torch.long)).shape == (3,)


def test_the_dot_product_has_biases_or_not() -> None:
    network = DotProduct(USERS, ITEMS, width=4)
    w = network.state_dict()
    expected = w["user.weight"][3] @ w["item.weight"][5] + w["user_bias.weight"][3] + w["item_bias.weight"][5]
    assert torch.allclose(network(torch.tensor([[3, 5]])), expected)
    assert [*DotProduct(USERS, ITEMS, biases=False).state_dict()] == ["user.weight", "item.weight"]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_one_optimizer_in_turns_equals_two_optimizers_by_hand(optimizer: Any) -> None:
    module, by_hand = nnmf(optimizer=optimizer), nnmf().network
    quiet_trainer(max_epochs=7).fit(module, ratings())
    pairs, values = training_part()
    kind = torch.optim.RMSprop if optimizer == "rmsprop" else torch.optim.Adam
    latent = [p for name, p in by_hand.named_parameters() if not name.startswith("mlp")]
    optimizers = [kind(by_hand.mlp.parameters(), lr=0.01), kind(latent, lr=0.01)]
    for step in range(7):
        loss = (by_hand(pairs) - values).square().mean() + sum(p.square().sum() for p in latent) / len(values)
        by_hand.zero_grad()
        loss.backward()
        optimizers[step % 2].step()
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(module.network.state_dict()[name], value, atol=1e-6), name


def test_a_penalty_per_rating_counts_every_rating_and_one_per_vector_every_batch() -> None:
    class Loss(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pairs, found = batch[0], float(pl_module.penalty(batch[0]))
            tables = {**pl_module.network.tables("user"), **pl_module.network.tables("item")}
            rows = [table(pairs[:, int(name[:4] == "item")]) for name, table in tables.items()]
            if pl_module.frequency_scaled:
                expected = sum(row.square().sum() for row in rows) / len(pairs)
            else:
                expected = sum(table.weight.square().sum() for table in tables.values()) / (len(pairs) * 4)
            assert found == pytest.approx(float(expected), rel=1e-5)

    for scaled in (False, True):
        trainer = quiet_trainer(max_epochs=1, callbacks=[Loss()])
        trainer.fit(nnmf(frequency_scaled=scaled), ratings(batch_size=64))
        assert trainer.global_step == 4


def test_the_logged_errors_are_those_of_all_samples() -> None:
    module, data = nnmf(), ratings(eval_batch_size=7)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    for part, found in (
        (data.val_dataloader(), trainer.callback_metrics["val_rmse"].item()),
        (data.test_dataloader(), trainer.test(module, data, verbose=False)[0]["test_rmse"]),
    ):
        errors = [float(module(pairs)[0] - value) ** 2 for pairs, value in _one_by_one(part)]
        assert found == pytest.approx((sum(errors) / len(errors)) ** 0.5, rel=1e-5)


def _one_by_one(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return [(pair[None], value) for pairs, values in loader for pair, value in zip(pairs, values, strict=True)]


# ------------------------------------------------------------------ biases


def solved(pairs: Tensor, values: Tensor, strength: float) -> Tensor:
    """The biases of all users and items, by one system of linear equations."""
    design = torch.zeros(len(values), USERS + ITEMS, dtype=torch.float64)
    rows = torch.arange(len(values))
    design[rows, pairs[:, 0]] = 1
    design[rows, USERS + pairs[:, 1]] = 1
    normal = design.T @ design + strength * torch.eye(USERS + ITEMS, dtype=torch.float64)
    return torch.linalg.solve(normal, design.T @ values.double())


@pytest.mark.parametrize("batch_size", [None, 64])
def test_biases_are_those_of_the_ridge_that_is_best_in_validation(batch_size: int | None) -> None:
    choices = [0.5, 3.0, 100.0]
    module, data = RidgeBiases(USERS, ITEMS, regularization=choices), ratings(batch_size=batch_size)
    quiet_trainer(max_epochs=120).fit(module, data)
    pairs, values = training_part()
    ((val_pairs, val_values),) = data.val_dataloader()
    errors, biases = [], [solved(pairs, values, strength) for strength in choices]
    for one in biases:
        errors.append(float((one[val_pairs[:, 0]] + one[USERS + val_pairs[:, 1]] - val_values).square().mean()))
    best = biases[errors.index(min(errors))]
    assert torch.allclose(torch.cat([module.user, module.item]).double(), best, atol=1e-4)


def test_biases_with_infinite_regularization_are_the_mean(tmp_path: Path) -> None:
    module, data = RidgeBiases(USERS, ITEMS, regularization=[float("inf")]), ratings(val_share=0.0)
    quiet_trainer(max_epochs=3).fit(module, data)
    assert not module.user.any()
    assert not module.item.any()
    error = quiet_trainer().test(module, data, verbose=False)[0]["test_rmse"]
    ((_, values),) = data.test_dataloader()
    assert error == pytest.approx(float(values.square().mean().sqrt()))


def test_biases_go_on_where_a_checkpoint_was_written(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> RidgeBiases:
        module = RidgeBiases(USERS, ITEMS)
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(module, ratings(), **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(3)
    whole, resumed = run(6), run(6, ckpt_path=tmp_path / "3.ckpt")
    assert torch.equal(whole.user, resumed.user)
    assert torch.equal(whole.item, resumed.item)


# ------------------------------------------------------------------ what it goes together with


def techniques() -> dict[str, Any]:
    everything = [*TABLES, "network.mlp.*"]
    return {
        "clustering": WeightClusteringCallback(4, start_epoch=2.0, target=everything),
        "pruning": IterativePruningCallback(0.5, target=everything, end_epoch=4.0),
        "quantization": QuantizationAwareTrainingCallback(3, activation_bits=None, start_epoch=2.0, target=everything),
    }


@pytest.mark.parametrize("name", techniques())
def test_a_resume_inside_the_turns_is_exact_with_callbacks(tmp_path: Path, name: str) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(*callbacks: Callback, **options: Any) -> dict[str, Tensor]:
        module = nnmf()
        quiet_trainer(max_epochs=8, callbacks=[techniques()[name], *callbacks]).fit(module, ratings(), **options)
        return {key: value.clone() for key, value in module.state_dict().items()}

    whole, resumed = run(Save()), run(ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    module = nnmf()
    quiet_trainer(max_epochs=8).fit(module, ratings())
    assert not torch.equal(whole["network.user.weight"], module.state_dict()["network.user.weight"])


@pytest.mark.parametrize(("name", "values"), [("clustering", 4), ("quantization", 8)])
@pytest.mark.parametrize("make", [nnmf, lambda: MatrixFactorization(DotProduct(USERS, ITEMS), alternate=False)])
def test_tables_have_few_values_and_make_a_small_file(tmp_path: Path, name: str, values: int, make: Any) -> None:
    module, technique = make(), techniques()[name]
    if isinstance(module.network, DotProduct):
        technique = type(technique)(*([4] if name == "clustering" else [3, None]), target=TABLES)
    quiet_trainer(max_epochs=6, callbacks=[technique]).fit(module, ratings())
    for side in ("user", "item"):
        table = module.network.get_submodule(side).weight
        rows = table if name == "quantization" else table.reshape(1, -1)  # a grid per row, or a codebook per table
        assert all(len(row.unique()) <= values for row in rows)
    size = save_compressed(module, tmp_path / "a.lcz")
    assert size.bytes < 2 * sum(p.numel() for p in module.parameters())
    loaded = load_compressed(tmp_path / "a.lcz", make())
    pairs = training_part()[0]
    assert torch.equal(loaded(pairs), module(pairs))


def test_a_wrapper_keeps_the_turns() -> None:
    def trained(wrap: Any) -> dict[str, Tensor]:
        module = nnmf()
        quiet_trainer(max_epochs=5).fit(wrap(module), ratings())
        return module.state_dict()

    def distil(module: LightningModule) -> LightningModule:
        return DistillationModule(module, nnmf(), alpha=0.0, loss="logit_regression", network="network")

    alone, wrapped = trained(lambda module: module), trained(distil)
    assert all(torch.equal(alone[name], wrapped[name]) for name in alone)


def test_two_ranks_end_equal_and_near_one_process(tmp_path: Path, rank_pair: RankPair) -> None:
    results = rank_pair.run("baselines.on_ranks:fit_ratings", tmp_path)
    module, biases = nnmf(lr=0.001), RidgeBiases(USERS, ITEMS)
    quiet_trainer(max_epochs=6).fit(module, ratings(val_share=0.037))  # 260 for training: two ranks share them evenly
    quiet_trainer(max_epochs=6).fit(biases, ratings(val_share=0.037))
    for trained in results:
        for name, value in module.state_dict().items():
            assert torch.equal(trained[0][name], results[0][0][name])
            assert torch.allclose(trained[0][name], value, atol=1e-4), name
        for name, value in biases.state_dict().items():
            assert torch.allclose(trained[1][name], value, atol=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NNMF(0, 3), "users of NNMF is the number of users that the data have; got 0"),
        (lambda: DotProduct(3, None), "items of DotProduct .* got None"),  # type: ignore[arg-type]
        (lambda: NNMF(3, 3, width=0, products=0), "width=0, products=0"),
        (lambda: NNMF(3, 3, hidden=()), r"hidden=\[\]"),
        (lambda: DotProduct(3, 3, width=0), "at least 1; got 0"),
        (lambda: nnmf(optimizer="lion"), "one of rmsprop, adam; got 'lion'"),
        (lambda: nnmf(lr_schedule="steps"), "lr_schedule must be one of .*; got 'steps'"),
        (lambda: nnmf(regularization=-1.0), "0 or more; got -1.0"),
        (lambda: MatrixFactorization(DotProduct(3, 3)), "DotProduct has latent vectors only: set alternate=False"),
        (lambda: RidgeBiases(3, 3, regularization=[]), r"got \[\]"),
        (lambda: RidgeBiases(3, 3, regularization=3.0), r"is a list of numbers .*; got 3\.0"),  # type: ignore[arg-type]
        (lambda: RidgeBiases(3, 3, regularization=[-1.0]), r"got \[-1\.0\]"),
    ],
)
def test_bad_settings_are_quoted(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: MatrixFactorization(NNMF(USERS, 7)), lambda: RidgeBiases(USERS, 7)])
def test_data_with_more_items_than_the_tables_are_refused(make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"The data have 20 items, and .* was made for 7: make it with users=30 and items"
    ):
        quiet_trainer(max_epochs=1).fit(make(), ratings())


def test_a_penalty_per_vector_needs_to_know_the_number_of_batches() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from zip(*training_part(), strict=True)

    loader = DataLoader(Endless(), batch_size=100)
    with pytest.raises(
        ValueError, match="the training loader has no length: use a loader with a length, or frequency_"
    ):
        quiet_trainer(max_epochs=1).fit(nnmf(), loader)
    quiet_trainer(max_epochs=1).fit(nnmf(frequency_scaled=True), loader)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_biases_are_the_same_in_every_precision(precision: Any) -> None:
    found = []
    for one in ("32-true", precision):
        module = RidgeBiases(USERS, ITEMS, regularization=[3.0])
        quiet_trainer(max_epochs=4, precision=one).fit(module, ratings())
        found.append(module.user.detach().float())
    assert torch.allclose(*found, atol=0.02)  # ratings and biases are rounded to 8 bits in bfloat16


def test_indices_beyond_the_tables_are_an_error_of_torch() -> None:
    assert isinstance(nnmf().network.user, nn.Embedding)
    with pytest.raises(IndexError):
        nnmf()(torch.tensor([[USERS, 0]]))


def test_checkpoints_of_biases_are_saved_after_each_epoch(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = RidgeBiases(USERS, ITEMS)
    quiet_trainer(callbacks=[kept], enable_checkpointing=True, max_epochs=2).fit(module, ratings())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    loaded = RidgeBiases.load_from_checkpoint(tmp_path / "epoch=1.ckpt", users=USERS, items=ITEMS)
    assert torch.equal(loaded.user, module.user)
