"""Widths in files and checkpoints: what comes back in another process, and what a plain class is told."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.registry import exits, qat
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer
from torch import Tensor

from lightning_compress import EarlyExitHeads, SlimmableWidth, load_compressed, save_compressed
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.early_exit.heads import heads_of
from lightning_compress.slimmable.norms import norms_of

X = torch.zeros(2, FEATURES)


def fitted(module: Any = None, **options: Any) -> SlimmableWidth:
    torch.manual_seed(1)
    wrapped = SlimmableWidth(module or SmallModule(), (0.25, 0.5), example_inputs=X, **options)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    wrapped.eval()
    return wrapped


def outputs(wrapped: SlimmableWidth, x: Tensor) -> list[Tensor]:
    found = []
    for width in (0.25, 0.5, 1.0):
        wrapped.set_width(width)
        found.append(wrapped(x).detach())
    return found


@pytest.mark.parametrize("norms", ["private", "statistics", "recalibrate"])
def test_a_compressed_file_brings_every_width_back(norms: Any, tmp_path: Path) -> None:
    wrapped = fitted(norms=norms)
    x = torch.randn(4, FEATURES)
    wrapped.set_width(0.5)  # which is no part of the file
    save_compressed(wrapped, tmp_path / "network.lc")
    loaded = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    torch.testing.assert_close(loaded(x), outputs(wrapped, x)[-1])
    held = norms_of(loaded)
    assert held is not None
    assert (held.widths, held.norms) == ((0.25, 0.5, 1.0), norms)
    again = SlimmableWidth(loaded, None, example_inputs=X)  # type: ignore[arg-type]
    for mine, other in zip(outputs(wrapped, x), outputs(again, x), strict=True):
        torch.testing.assert_close(mine, other)
    again.set_width(1.0)
    quiet_trainer(max_epochs=1).fit(again, plain(0), plain(1))


def test_a_file_with_exits_widths_and_grids_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = SlimmableWidth(exits().wrap(SmallModule()), (0.25, 0.5), example_inputs=X)
    quiet_trainer(max_epochs=1, callbacks=qat(start_epoch=0.5).callbacks()).fit(module, plain(0))
    module.eval()
    save_compressed(module, tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    assert heads_of(loaded) is not None
    inner = EarlyExitHeads(loaded, None, num_classes=CLASSES, example_inputs=X)
    again = SlimmableWidth(inner, None, example_inputs=X)
    x = torch.randn(4, FEATURES)
    for mine, other in zip(outputs(module, x), outputs(again, x), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_plain_class_loads_the_full_network_strictly_and_is_told() -> None:
    wrapped = fitted()
    plain_module = SmallModule().eval()
    with pytest.warns(UserWarning, match="has loaded the full network, and not what norms hold for each width"):
        plain_module.load_state_dict(wrapped.state_dict())
    wrapped.set_width(1.0)
    assert torch.equal(plain_module(X), wrapped(X))


def test_a_load_makes_widths_in_a_wrapper_that_knows_no_inputs_yet() -> None:
    wrapped = fitted()
    other = SlimmableWidth(SmallModule(), (0.25, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(wrapped.state_dict())
    assert norms_of(other) is not None
    with pytest.warns(UserWarning, match="channels of SmallModule are not known"):
        quiet_trainer().validate(other, plain(1), verbose=False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(other, plain(0), plain(1))  # finds them by a batch
    assert "width0.25/val_acc" in trainer.callback_metrics


@pytest.mark.parametrize("how", ["set_width", "extract", "deploy"])
def test_inputs_that_are_given_later_find_the_channels_of_a_loaded_network(how: str) -> None:
    wrapped, x = fitted(), torch.randn(4, FEATURES)
    loaded = SlimmableWidth(SmallModule(), (0.25, 0.5))
    loaded.load_state_dict(wrapped.state_dict())
    loaded.eval()
    with pytest.raises(ValueError, match="its channels are not known: pass example_inputs="):
        getattr(loaded, how)(*[0.5] * (how != "deploy"))
    if how == "set_width":
        loaded.set_width(0.5, example_inputs=X)
        found = loaded(x)
    elif how == "extract":
        found = loaded.extract(0.5, example_inputs=X).eval()(x)
    else:
        found = loaded.deploy(example_inputs=X)(x, width=0.5)
    torch.testing.assert_close(found, outputs(wrapped, x)[1])
    for mine, other in zip(outputs(loaded, x), outputs(wrapped, x), strict=True):
        torch.testing.assert_close(mine, other)  # they are known from now on


def test_other_widths_and_broken_records_are_refused_before_anything_changes() -> None:
    state = fitted().state_dict()
    other = SlimmableWidth(SmallModule(), (0.5,), example_inputs=X)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"was saved with the widths 0\.25, 0\.5, 1\.0, and this one has 0\.5, 1\.0"):
        other.load_state_dict(state)
    assert all(torch.equal(before[name], one) for name, one in other.state_dict().items())
    fresh = SlimmableWidth(SmallModule(), (0.25, 0.5))
    for change in (
        {"widths": [0.5, 0.25, 1.0]},
        {"widths": 3},
        {"norms": "public"},
        {"tensors": None},
        {"tensors": {"0_25": {"net.norm": ["nothing"]}, "0_5": {}}},
        {"tensors": {"0_25": {"net.norm": "weight"}, "0_5": {}}},
    ):
        broken = copy.deepcopy(state)
        broken._metadata[""][KEY]["widths"].update(change)  # type: ignore[attr-defined]
        with pytest.raises(RecordError, match="record of widths"):
            fresh.load_state_dict(broken)
        assert norms_of(fresh) is None


def test_a_network_without_its_widths_says_nothing_of_them() -> None:
    wrapped = fitted()
    extracted: Any = wrapped.extract(0.5)
    assert not any("width_norms" in name for name in extracted.state_dict())
    loaded = copy.deepcopy(extracted)
    loaded.load_state_dict(extracted.state_dict())
