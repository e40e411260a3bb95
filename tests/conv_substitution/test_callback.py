"""The callback: blocks stand before the first step, norms are computed anew, and other techniques find the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import fit
from support.small import SmallModule, dataset, quiet_trainer, shuffled
from torch import nn

from lightning_compress import (
    ConvSubstitutionCallback,
    IterativePruningCallback,
    channel_groups,
    cut,
    load_compressed,
    save_compressed,
    substitute_convs,
)
from lightning_compress.conv_substitution.blocks import FORMS
from lightning_compress.replacement.swap import replaced

LAYERS = ["net.block1.conv1", "net.block1.conv2", "net.block2.conv1", "net.block2.conv2"]


def small() -> SmallModule:
    torch.manual_seed(0)
    return SmallModule(residual=True)


def test_blocks_stand_before_the_first_step_and_reasons_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module = small()
    with caplog.at_level("INFO"):
        fit(None, module=module, callbacks=(ConvSubstitutionCallback(),), max_epochs=1)
    assert list(replaced(module)) == LAYERS
    assert caplog.text.count("As they were: net.conv: it has 1 input channel") == 1


def test_a_norm_in_evaluation_mode_keeps_its_statistics() -> None:
    class Kept(SmallModule):
        def configure_optimizers(self) -> Any:
            self.seen = {name: one.clone() for name, one in self.state_dict().items() if "running" in name}
            return super().configure_optimizers()

    module = Kept(residual=True)
    module.net.block1.norm.eval()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    quiet_trainer(callbacks=[ConvSubstitutionCallback()], max_epochs=1).fit(module, shuffled())
    same = {name for name, one in module.seen.items() if torch.equal(one, before[name])}
    assert same == {"net.block1.norm.running_mean", "net.block1.norm.running_var"}


@pytest.mark.parametrize("n_batches", [0, 4])
def test_norms_get_the_statistics_of_the_batches_and_a_refused_fit_gives_the_old_ones_back(n_batches: int) -> None:
    class Broken(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("broken")

        def on_train_start(self) -> None:
            self.seen = {name: one.clone() for name, one in self.state_dict().items() if "running" in name}

        def configure_optimizers(self) -> Any:
            self.made = {name: one.clone() for name, one in self.state_dict().items() if "running" in name}
            raise ValueError("no optimizer")

    torch.manual_seed(0)
    module = Broken(residual=True)
    before = {name: one.clone() for name, one in module.state_dict().items()}
    callback = ConvSubstitutionCallback(init="svd", n_batches=n_batches)
    with pytest.raises(ValueError, match="no optimizer"):
        quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled())
    changed = {name for name, one in module.made.items() if not torch.equal(one, before[name])}
    assert len(changed) == (6 if n_batches else 0)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(one, before[name]) for name, one in after.items())


def test_a_checkpoint_is_tested_in_a_new_module_and_the_file_loads_into_the_dense_class(tmp_path: Path) -> None:
    module = small()
    fit(None, module=module, callbacks=(ConvSubstitutionCallback("ghost"),), folder=tmp_path, max_epochs=1)
    other = small()
    trainer = quiet_trainer(callbacks=[ConvSubstitutionCallback("ghost")])
    (path,) = tmp_path.glob("*.ckpt")
    trainer.test(other, shuffled(), ckpt_path=path, verbose=False, weights_only=True)
    x = dataset().tensors[0][:4]
    torch.testing.assert_close(other.eval()(x), module.eval()(x))
    save_compressed(module, tmp_path / "net.lcz")
    torch.testing.assert_close(load_compressed(tmp_path / "net.lcz", small()).eval()(x), module(x))


@pytest.mark.parametrize("block", list(FORMS))
def test_channels_inside_and_around_blocks_are_pruned_and_the_file_loads(block: str, tmp_path: Path) -> None:
    module = small()
    callbacks = (
        ConvSubstitutionCallback(block, squeeze=0.5),  # type: ignore[arg-type]
        IterativePruningCallback(0.4, granularity="neuron", end_epoch=0.5, every_n_steps=2),
    )
    fit(None, module=module, callbacks=callbacks, max_epochs=1)
    module.eval()
    x = dataset().tensors[0][:4]
    assert sum(one.numel() for one in module.parameters()) < sum(one.numel() for one in small().parameters())
    save_compressed(module, tmp_path / "net.lcz")
    torch.testing.assert_close(load_compressed(tmp_path / "net.lcz", small()).eval()(x), module(x))


def two_convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()


@pytest.mark.parametrize("block", list(FORMS))
def test_channels_that_a_block_reads_and_returns_are_cut(block: str) -> None:
    network, x = two_convs(), torch.randn(2, 4, 6, 6)
    substitute_convs(network, x, block=block, target="2", squeeze=0.5)  # type: ignore[arg-type]
    groups = [one for one in channel_groups(network, x) if one.frozen is None and one.exact]
    assert any(member.tensor == "0.weight" for one in groups for member in one.members)
    before = sum(one.numel() for one in network.parameters())
    cut(network, x, keep={one.name: range(max(1, one.size // 2)) for one in groups})
    assert sum(one.numel() for one in network.parameters()) < before
    assert network(x).shape == (2, 4, 6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "dense"}, "block must be one of separable, .* got 'dense'"),
        ({"n_batches": 0}, "n_batches must be a whole number, 1 or more with init='data'"),
        ({"init": "svd", "n_batches": -1}, "n_batches must be a whole number, 0 or more with init='svd'"),
        ({"squeeze": 0}, "squeeze must be a share"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvSubstitutionCallback(**options)


def test_a_network_without_such_convolutions_is_refused_with_the_reasons() -> None:
    with pytest.raises(
        ValueError, match=r"No convolution of SmallModule can become .* net\.conv: it has 1 input channel"
    ):
        fit(None, module=SmallModule(), callbacks=(ConvSubstitutionCallback(),))


def test_a_running_generator_is_refused_with_what_helps() -> None:
    (batch, *_) = shuffled()
    callback = ConvSubstitutionCallback(example_inputs=batch[0])
    with pytest.raises(ValueError, match=r"come from a running generator, .* another iterable that begins anew"):
        quiet_trainer(callbacks=[callback], max_epochs=1).fit(small(), (one for one in [batch] * 9))
