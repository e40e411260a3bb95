from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.compare import differences
from support.ranks import RankPair
from support.small import BATCH, SAMPLES, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
    channel_groups,
    load_compressed,
    save_compressed,
)
from lightning_compress.quantization.input_grids import input_grids
from lightning_compress.quantization.observers import ObservedInputs
from lightning_compress.quantization.weights import quantize_weights

EPOCH = SAMPLES // BATCH
LAYERS = ("net.conv.weight", "net.hidden.weight", "net.head.weight")


def run(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> SmallModule:
    torch.manual_seed(0)
    module = module or SmallModule()
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, shuffled(), plain())
    return module  # type: ignore[return-value]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: module.get_parameter(name).detach().clone() for name in LAYERS}


def is_on_grid(weight: Tensor, bits: int, *, per_channel: bool = True) -> bool:
    """Whether 2^(b-1) - 1 or fewer steps of one size lead to every weight of a channel, by trying all sizes."""
    for row in weight.flatten(1) if per_channel else weight.flatten()[None]:
        largest = row.abs().max().double()
        steps = [row.double() / (largest / top) for top in range(1, 2 ** (bits - 1))]
        if largest > 0 and not any(torch.allclose(one, one.round(), atol=1e-4) for one in steps):
            return False
    return True


class Record(Callback):
    """Looks at the module and at what its layers see, as a user's own callback would."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.values: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for name in ("conv", "hidden", "head"):
            getattr(pl_module.net, name).register_forward_hook(
                lambda _, args, __, name=name: self.values.update({name: len(args[0].unique())})
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.trained.append(weights(pl_module))


# ---------------------------------------------------------------------- what has few bits, and when


@pytest.mark.parametrize("start_epoch", [0.0, 1.5])
def test_weights_and_inputs_have_few_bits_from_the_start_epoch_on(start_epoch: float) -> None:
    record, qat = Record(), QuantizationAwareTrainingCallback({"net.head": 2, "*": 4}, 3, start_epoch=start_epoch)
    module = run(qat, record)
    start = round(start_epoch * EPOCH)
    for step, seen in enumerate(record.trained, start=1):
        for name, weight in seen.items():
            assert is_on_grid(weight, 2 if "head" in name else 4) == (step >= start)
    assert all(count <= 8 for count in record.values.values())
    assert list(input_grids(module)) == ["net.conv", "net.hidden", "net.head"]
    assert input_grids(module) == qat.input_grids
    assert differences(weights(module), qat.latent) != []
    assert list(module.state_dict()) == list(SmallModule().state_dict())


def test_weights_alone_inputs_alone_and_what_is_left_out() -> None:
    module = run(QuantizationAwareTrainingCallback(2, None, exclude="net.head"))
    assert input_grids(module) == {}
    assert [is_on_grid(weight, 2) for weight in weights(module).values()] == [True, True, False]
    record = Record()
    module = run(QuantizationAwareTrainingCallback(None, 2, target="net.head"), record)
    assert record.values["head"] <= 4 < record.values["hidden"]
    assert not any(is_on_grid(weight, 4) for weight in weights(module).values())


def test_grids_follow_the_training_data_and_nothing_else() -> None:
    grids: list[Any] = []

    class Watch(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            grids.append(input_grids(pl_module))

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert grids[-1] == input_grids(pl_module)

    class Loud(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([1000 * batch[0], batch[1]], batch_idx)

    qat = QuantizationAwareTrainingCallback(smoothing=0.5)
    module = run(qat, Watch(), module=Loud())
    assert grids[0] == {} != grids[-1]  # the sanity check
    x = torch.cat([batch[0] for batch in shuffled()])
    scale = qat.input_grids["net.conv"].scale * 255
    assert 0.5 * float(x.max() - x.min()) < scale <= float(x.max() - x.min())
    before = input_grids(module)
    module.train()(100 * x)  # after the fit
    assert input_grids(module) == before


# ---------------------------------------------------------------------- from one process to another


def load_elsewhere(folder: str) -> list[Tensor]:
    x = next(iter(plain()))[0]
    return [load_compressed(Path(folder) / name, SmallModule()).eval()(x) for name in ("net.lcz", "last.ckpt")]


def test_the_grids_of_inputs_reach_another_process(rank_pair: RankPair, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)
    module = run(QuantizationAwareTrainingCallback(4, 2), checkpoint, enable_checkpointing=True)
    save_compressed(module, tmp_path / "net.lcz")
    x = next(iter(plain()))[0]
    module.eval()
    for outputs in rank_pair.run("quantization.test_callback:load_elsewhere", tmp_path, folder=str(tmp_path)):
        assert all(torch.equal(output, module(x)) for output in outputs)

    fresh = SmallModule()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTrainingCallback(4, 2)])
    trainer.test(fresh, plain(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert torch.equal(fresh.eval()(x), module(x))
    plainly = SmallModule().eval()
    plainly.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert not torch.equal(plainly(x), module(x))


def test_a_checkpoint_from_before_the_start_has_no_grids(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    qat = QuantizationAwareTrainingCallback(8, 2, start_epoch=2.0)
    module = run(qat, save, enable_checkpointing=True)
    whole = {"weights": weights(module), "state": qat.technique_state()}
    quiet_trainer(callbacks=[qat]).test(
        module, plain(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True
    )
    assert input_grids(module) == {}
    for epoch in (0, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        quiet_trainer(callbacks=[qat]).fit(module, shuffled(), plain(), ckpt_path=path, weights_only=True)
        assert differences(whole, {"weights": weights(module), "state": qat.technique_state()}) == []


def test_averages_are_validated_and_saved_on_the_grid_with_their_record(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    qat = QuantizationAwareTrainingCallback(3, 4)
    module = run(EMAWeightAveraging(decay=0.8), qat, checkpoint, enable_checkpointing=True)
    loaded = load_compressed(tmp_path / "last.ckpt", SmallModule())
    assert input_grids(loaded) == input_grids(module) != {}
    assert all(is_on_grid(weight, 3) for one in (module, loaded) for weight in weights(one).values())


# ---------------------------------------------------------------------- ranks and micro-batches


def ranges_on_ranks() -> dict[str, Any]:
    torch.manual_seed(0)
    qat = QuantizationAwareTrainingCallback(8, 4, smoothing=0.0)
    module = SmallModule()
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            seen.append((batch[0].min(), batch[0].max()))

    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[qat, Watch()], max_steps=2, accumulate_grad_batches=3)
    trainer.fit(module, shuffled())
    return {"grids": {name: vars(grid) for name, grid in qat.input_grids.items()}, "seen": torch.tensor(seen)}


def test_ranks_and_micro_batches_make_one_range(rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("quantization.test_callback:ranges_on_ranks", tmp_path)
    assert first["grids"] == second["grids"]
    seen = torch.cat([first["seen"][-3:], second["seen"][-3:]])  # of the last step
    assert first["grids"]["net.conv"]["scale"] == pytest.approx(float(seen[:, 1].max() - seen[:, 0].min()) / 15)


# ---------------------------------------------------------------------- with other techniques


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("start", [0.5, 2.0])
def test_pruned_weights_stay_zero(order: int, start: float) -> None:
    pruning = IterativePruningCallback(0.6, end_epoch=1.5, every_n_steps=3)
    qat = QuantizationAwareTrainingCallback(3, 8, start_epoch=start)
    module = run(*[pruning, qat][::order])
    for name, weight in weights(module).items():
        assert not weight[~pruning.masks[name]].any()
        assert not qat.latent[name][~pruning.masks[name]].any()
        assert bool((qat.latent[name][pruning.masks[name]] != 0).all())
    assert pruning.sparsity == pytest.approx(0.6, abs=0.01)
    quiet_trainer(callbacks=[qat], max_epochs=1).fit(module, shuffled(), plain())  # without the masks
    assert all(not weight[~pruning.masks[name]].any() for name, weight in weights(module).items())


def test_magnitudes_are_those_of_the_real_weights() -> None:
    """Weights of two bits are 0 or as large as all others: they rank nothing."""
    pruning, events = IterativePruningCallback(0.5, schedule="one_shot", start_epoch=1.0), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == EPOCH:
                events.append(torch.cat([qat.latent[name].abs().flatten() for name in LAYERS]))

    class Behind(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            for name, mask in pruning.masks.items():  # at once, also what rounded to zero already
                assert not qat.latent[name][~mask].any()

    qat = QuantizationAwareTrainingCallback(2, None)
    run(qat, Watch(), pruning, Behind(), max_epochs=2)
    kept = torch.cat([pruning.masks[name].flatten() for name in LAYERS])
    assert events[0][kept].min() >= events[0][~kept].max()


def test_clusters_are_put_on_one_grid_and_stay_clusters() -> None:
    pruning = IterativePruningCallback(0.5, end_epoch=1.0, every_n_steps=4)
    clustering = WeightClusteringCallback(6, start_epoch=1.5, gradient="mean")
    qat = QuantizationAwareTrainingCallback(4, 8, granularity="tensor", start_epoch=2.0)
    module = run(pruning, clustering, qat)
    for name, weight in weights(module).items():
        assert is_on_grid(weight, 4, per_channel=False)
        assert len(weight.unique()) <= 7
        index = clustering.indices[name].long()
        for cluster in index.unique():
            assert len(weight[index == cluster].unique()) == 1
            real = qat.latent[name][index == cluster]
            assert torch.equal(real, real[:1].expand_as(real))
        assert torch.equal(index == 0, ~pruning.masks[name])  # values that round to zero are not taken for pruned


@pytest.mark.parametrize(
    ("clustering", "qat", "message"),
    [
        ({}, {}, "a scale for each channel.*granularity='tensor'"),
        ({"scope": "global"}, {"granularity": "tensor"}, "cluster with scope='layer'"),
        ({"start_epoch": 1.0}, {"granularity": "tensor"}, "a start_epoch that is no later"),
    ],
)
def test_clusters_that_would_not_stay_equal_are_refused(clustering: Any, qat: Any, message: str) -> None:
    callbacks = [WeightClusteringCallback(4, **clustering), QuantizationAwareTrainingCallback(**qat)]
    with pytest.raises(ValueError, match=message):
        run(*callbacks)


def test_what_does_not_go_together_is_refused_and_the_rest_works() -> None:
    qat = QuantizationAwareTrainingCallback
    with pytest.raises(ValueError, match="put WeightClusteringCallback before QuantizationAwareTrainingCallback"):
        run(qat(granularity="tensor"), WeightClusteringCallback(4))
    with pytest.raises(ValueError, match=r"\w+ and \w+ both set the values of net\.conv\.weight"):
        run(qat(), BinaryWeightsCallback())
    with pytest.raises(ValueError, match=r"both set the inputs of net\.head, net\.hidden"):
        run(qat(None, 8), BinaryWeightsCallback(activations=True))
    with pytest.raises(ValueError, match=r"\(weight_bits=8\) and .*\(weight_bits=4\) both set the values of net"):
        run(qat(8), qat(4))
    with pytest.raises(ValueError, match=r"\(activation_bits=8\) and .*_bits=4\) both set the inputs of net"):
        run(qat(None, 8), qat(None, 4))
    with pytest.raises(ValueError, match=r"regrow=True\) trains latent values"):
        run(IterativePruningCallback(0.5, regrow=True), qat())
    with pytest.raises(ValueError, match=r"proximal=True\) shrinks .* would change the values that QuantizationAware"):
        run(qat(), GroupLassoCallback(0.1, proximal=True))
    with pytest.raises(ValueError, match=r"stop=\) still prunes net"):
        run(IterativePruningCallback(0.5, stop={"monitor": "val_acc", "max_drop": 0.5}), qat())
    module = run(BinaryWeightsCallback(), qat(None, 4))
    assert len(input_grids(module)) == 3
    clustering = WeightClusteringCallback(3, target="net.head", gradient="mean")
    module = run(clustering, qat(None, 4, target="net.head"), qat(4, target="net.hidden"))
    assert len(module.net.head.weight.unique()) <= 3


@pytest.mark.parametrize("order", [1, -1])
def test_channels_leave_a_network_on_grids(order: int, tmp_path: Path) -> None:
    states = []
    for resume in (None, tmp_path / "epoch=0.ckpt"):  # the grids are there already when the resumed fit plans
        pruning = IterativePruningCallback(0.5, granularity="neuron", end_epoch=2.0, shrink="during_fit")
        save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(0)
        module, trainer = (
            SmallModule(),
            quiet_trainer(
                callbacks=[*[pruning, QuantizationAwareTrainingCallback(4, 8)][::order], save],
                enable_checkpointing=True,
            ),
        )
        trainer.fit(module, shuffled(), plain(), ckpt_path=resume, weights_only=True)
        states.append(dict(module.state_dict()))
    assert differences(*states) == []
    assert module.net.hidden.out_features < 16
    assert all(is_on_grid(weight, 4) for weight in weights(module).values())
    assert len(input_grids(module)) == 3
    groups = channel_groups(module, torch.randn(2, 12))
    assert groups[0].frozen is None
    assert len(input_grids(module)) == 3


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "For one bit use BinaryWeightsCallback: weight_bits must be .* 2 to 8; got 1"),
        ({"weight_bits": 9}, "weight_bits must be a whole number from 2 to 8; got 9"),
        ({"weight_bits": True}, "got True"),
        ({"weight_bits": {"*": 2.5}}, "got 2.5"),
        ({"weight_bits": {}}, "names no layer"),
        ({"activation_bits": 16}, "activation_bits must be a whole number from 2 to 8; got 16"),
        ({"granularity": "layer"}, "granularity must be 'channel' or 'tensor'"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1; got 1.0"),
        ({"start_epoch": -1}, "start_epoch must be 0 or later"),
    ],
)
def test_bad_arguments(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTrainingCallback(**options)


def test_layers_that_are_skipped_are_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"Not quantized, because no pattern .*: net\.hidden\.weight, "):
        run(QuantizationAwareTrainingCallback({"net.conv": 8}), max_epochs=1)
    with pytest.warns(UserWarning, match=r"The weights of net\.norm\.weight are quantized, but no linear layer"):
        run(QuantizationAwareTrainingCallback(target=["net.norm.weight", "net.head"]), max_epochs=1)

    class Unused(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.warns(UserWarning, match="inputs of spare stay real: these layers were not called in training"):
        run(QuantizationAwareTrainingCallback(target=["net.*", "spare"]), module=Unused(), max_epochs=1)
    with pytest.warns(UserWarning, match="ended at step 12, before weights were quantized at step 24"):
        run(QuantizationAwareTrainingCallback(start_epoch=2.0), max_epochs=1)


def test_numbers_that_are_none_stop_the_fit() -> None:
    class Broken(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 3:
                batch[0][0, 0] = float("nan")
            return super().training_step(batch, batch_idx).nan_to_num()

    with pytest.raises(ValueError, match="NaN or infinite"):
        run(QuantizationAwareTrainingCallback(), module=Broken())
    module = SmallModule()
    module.net.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite: 1 of 48 real values of net\.head\.weight"):
        run(QuantizationAwareTrainingCallback(), module=module)


def test_inputs_of_a_compiled_module_are_refused() -> None:
    module = SmallModule()
    module.net.head = torch.compile(module.net.head, backend="eager")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\(activation_bits=\d\) works by hooks.* torch\.compile hides"):
        run(QuantizationAwareTrainingCallback(), module=module)
    run(QuantizationAwareTrainingCallback(8, None, target="net.hidden"), module=module, max_epochs=1)


def test_progress_is_logged() -> None:
    logged: dict[str, float] = {}

    class Metrics(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    module = run(QuantizationAwareTrainingCallback({"net.hidden": 2, "*": 8}, None), Metrics(), max_epochs=1)
    count = {name: weight.numel() for name, weight in weights(module).items()}
    assert logged["compress/weight_bits"] == pytest.approx(8 - 6 * count[LAYERS[1]] / sum(count.values()))
    zeros = sum(int((weight == 0).sum()) for weight in weights(module).values())
    assert logged["compress/zeros"] == pytest.approx(zeros / sum(count.values()))
    assert 0 < logged["compress/clipped"] < 0.2


def test_real_weights_of_another_epoch_are_refused(tmp_path: Path) -> None:
    module = SmallModule()
    qat = QuantizationAwareTrainingCallback()
    quiet_trainer(callbacks=[qat], max_epochs=1).fit(module, plain())
    with torch.no_grad():  # of the same signs, mostly as far from zero: what an earlier epoch's weights are like
        for name in qat.latent:
            module.get_parameter(name).mul_(1.01)
    with pytest.raises(ValueError, match="no longer holds the values"), qat.real_weights(module):
        pass


def test_a_network_in_evaluation_mode_is_observed_all_the_same() -> None:
    module = SmallModule()
    module.net.eval()
    qat = QuantizationAwareTrainingCallback()
    quiet_trainer(callbacks=[qat], max_epochs=1).fit(module, plain())
    assert sorted(qat.input_grids) == ["net.conv", "net.head", "net.hidden"]


def test_odd_inputs() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    inputs = ObservedInputs(net, ["0"], 8)
    assert net(torch.zeros(0, 2)).shape == (0, 2)  # an expert that nothing was sent to
    assert inputs.seen().isneginf().all()
    with pytest.raises(ValueError, match=r"Linear was called with torch\.int64"):
        net(torch.zeros(1, 2, dtype=torch.int64))


def test_what_quantizes_nothing_is_refused_and_what_is_zero_is_said_aloud() -> None:
    with pytest.raises(ValueError, match="quantizes nothing"):
        QuantizationAwareTrainingCallback(None, None)
    with pytest.raises(ValueError, match="quantizes nothing"):
        QuantizationAwareTrainingCallback({"*": None}, 8)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.warns(UserWarning, match="weight: every entry is zero"):
        quantize_weights(layer)
