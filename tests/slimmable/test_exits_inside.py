"""Exits at every width of one network: trained together, calibrated and deployed for each width, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.registry import exits
from support.small import CLASSES, FEATURES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_compress import EarlyExitHeads, SlimmableWidth, load_compressed, save_compressed
from lightning_compress.early_exit.heads import heads_of
from lightning_compress.trainer.compatibility import IncompatibleError

X = torch.zeros(2, FEATURES)
LAYERS = ("net.norm", "net.hidden")


@pytest.fixture(scope="module")
def trained() -> tuple[Any, SlimmableWidth]:
    torch.manual_seed(1)
    inner = exits(LAYERS).wrap(SmallModule())
    wrapped = SlimmableWidth(inner, (0.5, 1.0), example_inputs=X)
    loader = DataLoader(dataset(0, 600), batch_size=30)
    quiet_trainer(max_epochs=3).fit(wrapped, loader, plain(1))
    return inner, wrapped


def loader(seed: int) -> DataLoader[Any]:
    return DataLoader(dataset(seed, 600), batch_size=100)


def outputs_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    """Return the logits of each exit and of the network, which is a plain one."""
    found: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(layer).register_forward_hook(lambda m, a, out, layer=layer: found.update({layer: out}))
        for layer in LAYERS
    ]
    with torch.no_grad():
        full = network.eval()(x)
        exits = [network.get_submodule(f"exit_heads.{k}")(found[layer]) for k, layer in enumerate(LAYERS, start=1)]
    for handle in handles:
        handle.remove()
    return [*exits, full]


def test_every_width_is_logged_with_its_exits(trained: tuple[Any, SlimmableWidth]) -> None:
    _, wrapped = trained
    found = quiet_trainer().validate(wrapped, plain(1), verbose=False)[0]
    names = {name.removesuffix("val_acc") for name in found if name.endswith("val_acc")}
    exits, widths = ("", "exit1/", "exit2/", "exit3/"), ("", "width0.5/", "width1.0/")
    assert names == {f"{width}{exit}" for width in widths for exit in exits}
    x, y = dataset(1).tensors
    for width in (0.5, 1.0):
        for label, logits in zip(exits[1:], outputs_by_hand(wrapped.extract(width), x), strict=True):
            accuracy = float((logits.argmax(1) == y).float().mean())
            assert found[f"width{width}/{label}val_acc"] == pytest.approx(accuracy), (width, label)


def test_exits_are_calibrated_and_deployed_for_each_width(trained: tuple[Any, SlimmableWidth], tmp_path: Path) -> None:
    inner, wrapped = trained
    x, y = dataset(5, 600).tensors
    rules = {}
    for width in (0.5, 1.0):
        wrapped.set_width(width)
        outcome = inner.calibrate(loader(5), budget=0.7, unit="share")
        early = inner.deploy(min_gain=float("-inf"))
        answers, exit_index = early(x)
        assert torch.equal(exit_index, outcome.exit_index)
        assert float((answers.argmax(1) == y).float().mean()) == pytest.approx(outcome.accuracy)
        by_hand = torch.stack(outputs_by_hand(wrapped.extract(width), x))
        torch.testing.assert_close(answers, by_hand[exit_index, torch.arange(600)])
        rules[width] = early.rule
        assert early.rule is not None
    assert sum(rules[0.5].stages) < 0.5 * sum(rules[1.0].stages)
    wrapped.set_width(1.0)

    save_compressed(wrapped, tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    heads = heads_of(loaded)
    assert heads is not None
    assert heads.rules == {"width 0.5": rules[0.5], "": rules[1.0]}
    again = EarlyExitHeads(loaded, None, num_classes=CLASSES, example_inputs=X)
    widths = SlimmableWidth(again, None, example_inputs=X)
    for width in (0.5, 1.0):
        widths.set_width(width)
        wrapped.set_width(width)
        for mine, other in zip(again.deploy()(x), inner.deploy()(x), strict=True):
            torch.testing.assert_close(mine, other)
    wrapped.set_width(1.0)


def test_operating_points_are_widths_and_exits_at_each_width(trained: tuple[Any, SlimmableWidth]) -> None:
    _, wrapped = trained
    before = quiet_trainer().validate(wrapped, plain(1), verbose=False)[0]
    points = {one.name: one for one in wrapped.operating_points()}
    assert {"width 0.5", *(f"width {w}, exit {k}" for w in ("0.5", "1") for k in (1, 2))} <= points.keys()
    x, y = dataset(1).tensors
    for name, width, place in (("width 0.5", 0.5, 2), ("width 0.5, exit 1", 0.5, 0), ("width 1, exit 2", 1.0, 1)):
        expected = float((outputs_by_hand(wrapped.extract(width), x)[place].argmax(1) == y).float().mean())
        with points[name].answering():
            tested = quiet_trainer().test(wrapped, plain(1), verbose=False)[0]
        assert tested["test_acc"] == pytest.approx(expected)
        assert len(tested) == (4 if name == "width 0.5" else 1), "each exit of a width, or one exit"
        with torch.no_grad():
            assert float((points[name].network.eval()(x).argmax(1) == y).float().mean()) == pytest.approx(expected)
    assert quiet_trainer().validate(wrapped, plain(1), verbose=False)[0] == before


def test_the_other_order_is_refused_with_the_remedy() -> None:
    inner = SlimmableWidth(SmallModule(), (0.5,), example_inputs=X)
    wrapped = exits(LAYERS).wrap(inner)
    with pytest.raises(IncompatibleError, match=r"EarlyExitHeads.* around it .*wrapper of widths may be around"):
        quiet_trainer(max_epochs=1).fit(wrapped, plain(0), plain(1))
