from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from support.small import BATCH, SAMPLES, ManualModule, SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GroupLassoCallback, IterativePruningCallback, WeightClusteringCallback
from lightning_compress.clustering.kmeans import kmeans
from lightning_compress.core.numbers_by_pattern import numbers_by_name

EPOCH = SAMPLES // BATCH
LAYERS = ("net.conv.weight", "net.hidden.weight", "net.head.weight")


class Record(Callback):
    """Looks at the module after every batch, as a user's own callback would."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        self.weights.append({name: parameters[name].detach().clone() for name in LAYERS})

    def values(self, step: int, name: str) -> Tensor:
        return self.weights[step - 1][name].unique()


def run(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> SmallModule:
    torch.manual_seed(0)
    module = module or SmallModule()
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, shuffled(), plain())
    return module  # type: ignore[return-value]


# ---------------------------------------------------------------------- what is shared, and when


@pytest.mark.parametrize("start_epoch", [0.0, 1.0, 1.5])
def test_weights_are_shared_from_the_start_epoch_on(start_epoch: float) -> None:
    record = Record()
    clustering = WeightClusteringCallback(4, start_epoch=start_epoch)
    module = run(clustering, record)
    start = round(start_epoch * EPOCH)
    for name in LAYERS:
        for step in range(1, 4 * EPOCH + 1):
            assert (len(record.values(step, name)) <= 4) == (step >= start)
        codebook, index = clustering.codebooks[name], clustering.indices[name]
        assert torch.equal(module.get_parameter(name).detach(), codebook.float()[index.long()])
        assert index.dtype == torch.uint8
    assert len(module.net.hidden.bias.unique()) > 4
    assert not torch.equal(
        record.values(4 * EPOCH, LAYERS[1]), record.values(max(start, 1), LAYERS[1])
    )  # they train on


def test_clusters_are_those_of_kmeans() -> None:
    torch.manual_seed(0)
    module = SmallModule()
    expected = kmeans(module.net.hidden.weight, 6)
    clustering = WeightClusteringCallback(6)
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            seen.append(pl_module.get_parameter("net.hidden.weight").detach().clone())

    quiet_trainer(callbacks=[clustering, Look()], max_steps=1).fit(module, shuffled())
    assert seen[0].unique().tolist() == pytest.approx(expected.tolist())


def test_one_codebook_for_all() -> None:
    clustering = WeightClusteringCallback(5, scope="global")
    module = run(clustering)
    together = torch.cat([module.get_parameter(name).flatten() for name in LAYERS]).unique()
    assert len(together) <= 5
    assert list(clustering.codebooks) == ["*"]


class Line(LightningModule):
    """A linear model, for which training shared weights is written out by hand."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3, bias=False)
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_against_training_the_table_itself(optimizer: str, gradient: Any, accumulate: int) -> None:
    """The oracle's parameter is the table; its gradient comes from autograd through table[index]."""
    torch.manual_seed(3)
    module = Line(OPTIMIZERS[optimizer])
    weight = module.layer.weight.detach().clone()
    table = nn.Parameter(kmeans(weight, 4).float())
    index = (weight[..., None] - table).abs().argmin(-1)
    counts = torch.bincount(index.flatten()).float()

    clustering = WeightClusteringCallback(4, gradient=gradient)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    quiet_trainer(callbacks=[clustering], **options).fit(module, plain(0))

    by_hand = OPTIMIZERS[optimizer]([table])
    for _ in range(2):
        for batch, (x, y) in enumerate(plain(0), start=1):
            (F.cross_entropy(F.linear(x, table[index]), y) / accumulate).backward()
            if batch % accumulate == 0:
                assert table.grad is not None
                table.grad /= counts if gradient == "mean" else 1.0
                by_hand.step()
                by_hand.zero_grad()
    assert torch.allclose(module.layer.weight, table[index], atol=1e-5)


def test_gradients_are_shared_before_they_are_clipped() -> None:
    """Clipping compares the norm of the gradients that the optimizer will use."""
    norms = []

    class Norm(SmallModule):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norms.append(len(self.net.hidden.weight.grad.unique()))
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    module = run(WeightClusteringCallback(4), module=Norm(), gradient_clip_val=0.1, max_epochs=1)
    assert norms
    assert max(norms) <= 4
    assert len(module.net.hidden.weight.unique()) <= 4


def test_each_optimizer_shares_only_what_it_steps() -> None:
    """Sharing twice, once for each optimizer, would multiply sums by the clusters' sizes."""
    seen = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append(
                [len(pl_module.net.get_parameter(f"{name}.weight").grad.unique()) for name in ("conv", "hidden")]
            )

    torch.manual_seed(0)
    module = ManualModule(activation=torch.tanh)  # units that stay silent have a gradient of one value
    run(WeightClusteringCallback(4), Look(), module=module, max_epochs=1)
    assert len(seen) == 2 * EPOCH
    assert all(conv <= 4 < hidden for conv, hidden in seen[::2])  # the convolution's optimizer is about to step
    assert all(hidden <= 4 for _, hidden in seen[1::2])


def test_a_parameter_without_gradient_stays() -> None:
    module = SmallModule()
    module.net.hidden.weight.requires_grad_(False)
    record = Record()
    run(WeightClusteringCallback(4, target="net.*"), record, module=module)
    assert torch.equal(record.weights[0]["net.hidden.weight"], record.weights[-1]["net.hidden.weight"])
    assert len(record.values(1, "net.hidden.weight")) == 4


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precisions(precision: Any) -> None:
    module = run(WeightClusteringCallback(4), precision=precision, max_epochs=2)
    for name in LAYERS:
        assert len(module.get_parameter(name).unique()) <= 4


# ---------------------------------------------------------------------- with pruning


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_pruned_weights_stay_zero_and_leave_their_clusters(order: int, options: dict[str, Any]) -> None:
    record = Record()
    pruning = IterativePruningCallback(0.8, end_epoch=3.0, every_n_steps=2)
    clustering = WeightClusteringCallback(6, start_epoch=1.0)
    module = run(*[pruning, clustering][::order], record, module=SmallModule("adam"), **options)
    total = sum(module.get_parameter(name).numel() for name in LAYERS)
    zeros = sum(int((module.get_parameter(name) == 0).sum()) for name in LAYERS)
    assert zeros == round(0.8 * total)
    for weights in record.weights[EPOCH:]:
        for name in LAYERS:
            assert len(weights[name].unique()) <= 7
    for name in LAYERS:
        pruned = clustering.indices[name] == 0
        assert torch.equal(pruned, module.get_parameter(name) == 0)
        assert torch.equal(~pruned, pruning.masks[name])
        assert clustering.codebooks[name][0] == 0


def test_pruned_weights_do_not_pull_at_their_former_cluster() -> None:
    """Two runs that differ in the data of the pruned inputs alone train the same shared values."""
    results = []
    for noise in (0.0, 1000.0):
        torch.manual_seed(3)
        module = Line(OPTIMIZERS["sgd"])
        module.layer.weight.data[:, :4] = 0.0
        x, y = dataset().tensors
        x = torch.cat([torch.full((SAMPLES, 4), noise), x[:, 4:]], dim=1)
        loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
        clustering = WeightClusteringCallback(3)
        quiet_trainer(callbacks=[clustering], max_epochs=1).fit(module, loader)
        results.append(module.layer.weight.detach().clone())
    assert torch.equal(*results)
    assert not results[0][:, :4].any()


def test_what_trains_behind_a_mask_or_shrinks_apart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"IterativePruningCallback\(regrow=True\) trains latent values"):
        run(IterativePruningCallback(0.5, regrow=True), WeightClusteringCallback(4))
    with pytest.raises(
        ValueError,
        match=r"\(proximal=True\) shrinks .* would change the values that WeightClustering",
    ):
        run(WeightClusteringCallback(4), GroupLassoCallback(0.1, proximal=True))
    module = run(WeightClusteringCallback(4), GroupLassoCallback(0.01))
    assert len(module.net.hidden.weight.unique()) <= 4


def test_a_cut_of_channels_is_followed() -> None:
    """What a callback that removes channels does: the module is sliced, then everybody is told what stayed."""
    clustering = WeightClusteringCallback(4)
    module = run(clustering, max_epochs=1)
    kept = torch.tensor([0, 3, 4, 7, 15])
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.net.hidden.weight.data = module.net.hidden.weight.data[kept]
    module.net.head.weight.data = module.net.head.weight.data[:, kept]
    clustering.follow_cut(
        trainer, module, {"net.hidden.weight": {0: kept}, "net.hidden.bias": {0: kept}, "net.head.weight": {1: kept}}
    )
    for name in LAYERS:
        weight = module.get_parameter(name).detach()
        assert torch.equal(weight, clustering.codebooks[name].float()[clustering.indices[name].long()])
    assert clustering.projection is not None
    clustering.projection.project()
    assert len(module.net.hidden.weight.unique()) <= 4


# ---------------------------------------------------------------------- which layers, and how many clusters


def _clusters(net: nn.Module, numbers: Any, **options: Any) -> dict[str, int]:
    names = {"argument": "n_clusters", "done": "clustered", "leaving": "0"}
    return numbers_by_name(net, numbers, **names, **options)


def test_the_first_pattern_that_matches_counts() -> None:
    net = SmallModule()
    assert _clusters(net, {"net.conv": 8, "net.head": 0, "*": 3}) == {LAYERS[0]: 8, LAYERS[1]: 3}
    assert _clusters(net, {"*": 3, "net.conv": 8}) == dict.fromkeys(LAYERS, 3)
    assert _clusters(net, {"*": 3, "net.head.bias": 2}, exclude="net.hidden") == {
        LAYERS[0]: 3,
        LAYERS[2]: 3,
        "net.head.bias": 2,
    }
    assert _clusters(net, 7, target="net.head") == {LAYERS[2]: 7}
    assert _clusters(net, 0) == {}


def test_layers_that_no_pattern_names_are_named_aloud() -> None:
    with pytest.warns(UserWarning, match=r"Not clustered, .* names them: net\.hidden\.weight, net\.head\.weight\. Add"):
        assert _clusters(SmallModule(), {"net.conv": 8}) == {LAYERS[0]: 8}
    with pytest.warns(UserWarning, match=r"names them: net\.head\.weight\."):
        _clusters(SmallModule(), {"net.conv": 8}, target=["net.conv", "net.head"])
    with pytest.warns(UserWarning, match="n_clusters pattern 'fc*' matches no parameter".replace("*", r"\*")):
        _clusters(SmallModule(), {"*": 8, "fc*": 4})
    with pytest.warns(UserWarning, match="matches no"), pytest.raises(ValueError, match=r"n_clusters=.*selects no"):
        _clusters(SmallModule(), {"fc*": 4})


def test_more_clusters_than_weights_and_all_zero_layers_are_said_aloud() -> None:
    module = SmallModule()
    module.net.head.weight.data.zero_()
    with (
        pytest.warns(UserWarning, match=r"net\.conv\.weight: 100 clusters .* 18 distinct values besides zero"),
        pytest.warns(UserWarning, match=r"net\.head\.weight: every entry is zero, so all of them count as pruned"),
    ):
        run(WeightClusteringCallback(100), module=module, max_epochs=1)
    assert len(module.net.conv.weight.unique()) == 18
    assert not module.net.head.weight.any()


def test_progress_is_logged() -> None:
    logged: dict[str, float] = {}

    class Metrics(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    first = WeightClusteringCallback(4, target="net.hidden")
    run(first, WeightClusteringCallback(2, target="net.head"), Metrics(), max_epochs=1)
    assert (logged["compress/clusters"], logged["compress/clusters_2"]) == (4, 2)
    assert logged["compress/bits_per_weight"] == pytest.approx(2 + 4 * 32 / 1152)
    assert logged["compress/bits_per_weight_2"] == pytest.approx(1 + 2 * 32 / 48)


# ---------------------------------------------------------------------- fits, checkpoints, averages


def test_averaged_copies_are_projected(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    average = EMAWeightAveraging(decay=0.9)
    clustering = WeightClusteringCallback(4, start_epoch=1.0)
    module = run(average, clustering, checkpoint, enable_checkpointing=True)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    for source in (saved, module.state_dict()):
        for name in LAYERS:
            assert len(source[name].unique()) <= 4
    with pytest.raises(ValueError, match="StochasticWeightAveraging"):
        run(StochasticWeightAveraging(swa_lrs=0.1), WeightClusteringCallback(4))


def test_a_dense_epoch_does_not_win_best(tmp_path: Path) -> None:
    class Dense(SmallModule):
        def on_validation_epoch_end(self) -> None:
            self.log("values", float(len(self.net.hidden.weight.unique())))

    checkpoint = ModelCheckpoint(tmp_path, monitor="values", mode="max")
    clustering = WeightClusteringCallback(4, start_epoch=2.0)
    run(clustering, checkpoint, module=Dense(), enable_checkpointing=True)
    assert float(checkpoint.best_model_score) <= 4


def test_a_checkpoint_keeps_the_indices_small(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    run(WeightClusteringCallback(16), checkpoint, enable_checkpointing=True, max_epochs=1)
    (state,) = [
        value
        for key, value in torch.load(checkpoint.last_model_path, weights_only=True)["callbacks"].items()
        if "Clustering" in key
    ]
    assert {index.dtype for index in state["technique"]["indices"].values()} == {torch.uint8}


def test_a_new_fit_clusters_loaded_weights_anew_only_with_a_new_callback() -> None:
    clustering, module = WeightClusteringCallback(4), SmallModule()
    quiet_trainer(callbacks=[clustering], max_epochs=1).fit(module, shuffled())
    module.load_state_dict(SmallModule().state_dict())
    with pytest.raises(ValueError, match=r"net\.conv\.weight no longer holds the shared values.*make a new callback"):
        quiet_trainer(callbacks=[clustering], max_epochs=1).fit(module, shuffled())


def test_one_callback_goes_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    clustering = WeightClusteringCallback(4, start_epoch=2.0)
    seed_everything(0, verbose=False)
    module = run(clustering, save, enable_checkpointing=True)
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    quiet_trainer(callbacks=[clustering]).fit(
        module, shuffled(), plain(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    for name, value in module.state_dict().items():
        assert torch.equal(value, whole[name])


def test_a_fit_that_ends_before_the_start_says_so() -> None:
    with pytest.warns(
        UserWarning,
        match=r"ended at step 12, before weights were clustered at step 24: use an earlier start_epoch than 2\.0",
    ):
        run(WeightClusteringCallback(4, start_epoch=2.0), max_epochs=1)


def test_no_warning_in_an_ordinary_fit() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(WeightClusteringCallback({"net.conv": 4, "*": 3}))
    assert [str(w.message) for w in caught if "lightning_compress" in str(w.filename)] == []


class Unlogged(SmallModule):
    """Dynamo can't trace `self.log` in this version of Lightning, with or without us."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_a_compiled_module() -> None:
    results = []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        torch.manual_seed(0)
        module = Unlogged()
        clustering = WeightClusteringCallback({"net.conv": 3, "*": 4}, start_epoch=1.0)
        quiet_trainer(callbacks=[clustering], max_epochs=2).fit(wrap(module), shuffled(), plain())
        results.append(module.state_dict())
        assert len(module.net.hidden.weight.unique()) <= 4
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-5)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": -1}, "n_clusters must be a whole number, at least 1, or 0 to change nothing; got -1"),
        ({"n_clusters": 2.5}, "got 2.5"),
        ({"n_clusters": {"a": 1.5}}, r"n_clusters\['a'\] must be a whole number.* got 1.5"),
        ({"n_clusters": {}}, r"n_clusters=\{\} names no layer"),
        ({"n_clusters": {"a": 2}, "scope": "global"}, "scope='global' makes one codebook"),
        ({"init": "random"}, "init must be 'optimal', 'linear' or 'density'; got 'random'"),
        ({"gradient": "max"}, "gradient must be 'sum' or 'mean' over the cluster; got 'max'"),
        ({"scope": "net"}, "scope must be 'layer' or 'global'; got 'net'"),
        ({"start_epoch": -1.0}, "start_epoch must be 0 or later; got -1.0"),
        ({"start_epoch": float("nan")}, "start_epoch must be 0 or later; got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightClusteringCallback(**options)


def test_weights_that_are_no_numbers_name_their_layer() -> None:
    module = SmallModule()
    module.net.hidden.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite: 1 of 1152 in net\.hidden\.weight"):
        run(WeightClusteringCallback(4), module=module)


def test_clustering_the_same_weights_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Weight.* and Weight.* both set the values of net\.head\.weight: use"):
        run(WeightClusteringCallback(4), WeightClusteringCallback({"net.head": 2, "net.conv": 0}))


def test_one_codebook_needs_one_optimizer_that_trains_all_of_it() -> None:
    with pytest.raises(
        ValueError, match=r"scope='global'.* net\.hidden\.weight is frozen, or no optimizer or another one trains it"
    ):
        run(WeightClusteringCallback(4, scope="global"), module=ManualModule())
    module = SmallModule()
    module.net.hidden.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"net\.hidden\.weight is frozen"):
        run(WeightClusteringCallback(4, scope="global", target="net.*"), module=module)


def test_unannounced_steps_are_refused() -> None:
    class Raw(ManualModule):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.raises(RuntimeError, match="use_pl_optimizer=True"):
        run(WeightClusteringCallback(4), module=Raw())
