"""Grids of quantized inputs for each width, against ranges that a hook of the test has seen."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from support.small import FEATURES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTrainingCallback, SlimmableWidth, load_compressed, save_compressed
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.hooks import hooked
from lightning_compress.core.input_hooks import input_hook
from lightning_compress.core.records import records
from lightning_compress.quantization.input_grids import InputGrid, InputQuantizer, input_grids
from lightning_compress.slimmable.norms import give_norms, take_norms
from lightning_compress.slimmable.switch import set_width, thin_of

X = torch.zeros(2, FEATURES)
KEEPS, BITS = 0.5, 8
LAYERS = ("conv", "hidden", "head")
CHANNELS = {2: 0.25, 3: 0.5, 6: 1.0}  # widths by the channels of the layer "conv"


Ranges = dict[tuple[str, float], list[tuple[float, float]]]


def watch(net: Any, found: Ranges) -> list[Any]:
    """Keep the smallest and the largest real input of each layer and step in training, by layer and width."""
    width = 1.0

    def look(layer: nn.Module, args: tuple[Tensor], name: str) -> None:
        nonlocal width
        if layer.training:
            width = CHANNELS[layer.out_channels] if isinstance(layer, nn.Conv1d) else width
            found.setdefault((name, width), []).append((float(args[0].min()), float(args[0].max())))

    return [getattr(net, name).register_forward_pre_hook(partial(look, name=name)) for name in LAYERS]


def fitted(steps: int, folder: Path, *, resume: Path | None = None, norms: Any = "private") -> tuple[Any, Ranges]:
    seed_everything(1)
    options: dict[str, Any] = {"norms": norms, "weights": "equal"}  # which do not depend on the length of the fit
    wrapped, found = SlimmableWidth(SmallModule(), (0.25, 0.5), example_inputs=X, **options), Ranges()
    callback = QuantizationAwareTrainingCallback(8, BITS, smoothing=KEEPS)
    trainer = quiet_trainer(max_steps=steps, callbacks=[callback])
    with hooked(*watch(wrapped.net, found)):
        trainer.fit(wrapped, plain(0), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return wrapped, found


def grid_of(layer: nn.Module, width: float) -> InputGrid:
    hook: Any = copy.deepcopy(input_hook(layer))
    hook.settle("" if width == 1.0 else f"width {width}")
    assert hook.grid is not None
    return hook.grid  # type: ignore[no-any-return]


def test_each_width_has_the_grid_of_its_own_inputs(tmp_path: Path) -> None:
    module, ranges = fitted(6, tmp_path)
    assert ranges.keys() == {(name, width) for name in LAYERS for width in (0.25, 0.5, 1.0)}
    for (name, width), pairs in ranges.items():
        assert len(pairs) == 6
        low, high = min(0.0, pairs[0][0]), max(0.0, pairs[0][1])
        for smallest, largest in pairs[1:]:
            low = KEEPS * low + (1 - KEEPS) * min(0.0, smallest)
            high = KEEPS * high + (1 - KEEPS) * max(0.0, largest)
        found, expected = grid_of(getattr(module.net, name), width), InputGrid.covering(low, high, BITS)
        assert found.scale == pytest.approx(expected.scale, rel=1e-5)
        assert found.zero_point == expected.zero_point
    assert len({grid_of(module.net.hidden, width) for width in (0.25, 0.5, 1.0)}) == 3
    assert len({grid_of(module.net.conv, width) for width in (0.25, 0.5, 1.0)}) == 1  # the same images


def test_files_extracted_networks_and_loads_have_them(tmp_path: Path) -> None:
    module, _ = fitted(6, tmp_path)
    module.eval()
    x = dataset(0).tensors[0][:8]
    save_compressed(module, tmp_path / "file.lcz")
    loaded = load_compressed(tmp_path / "file.lcz", SmallModule()).eval()
    again = SlimmableWidth(loaded, None, example_inputs=X)
    slim = module.deploy()
    for width in (0.25, 0.5, 1.0):
        thin = module.extract(width).eval()
        assert {name: grid_of(layer, 1.0) for name, layer in thin.net.named_children() if input_hook(layer)} == {
            name: grid_of(getattr(module.net, name), width) for name in LAYERS
        }
        assert input_grids(thin)["net.hidden"] == grid_of(module.net.hidden, width)
        module.set_width(width)
        again.set_width(width)
        with torch.no_grad():
            expected = module(x)
            torch.testing.assert_close(thin(x), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(slim(x, width=width), expected, rtol=0, atol=1e-6)
            assert torch.equal(again(x), expected)
        save_compressed(thin, tmp_path / "thin.lcz")
        assert input_grids(load_compressed(tmp_path / "thin.lcz", SmallModule())) == input_grids(thin)
        module.set_width(1.0)
    take_norms(module)
    assert not any(input_hook(one).ways for one in (module.net.conv, module.net.hidden, module.net.head))


def test_a_resume_goes_on_with_the_ranges_of_each_width(tmp_path: Path) -> None:
    whole, _ = fitted(24, tmp_path)
    fitted(12, tmp_path)
    resumed, _ = fitted(24, tmp_path, resume=tmp_path / "12.ckpt")
    assert torch.equal(resumed.net.hidden.weight, whole.net.hidden.weight)
    written = [records(one.state_dict()._metadata)["grid"] for one in (whole, resumed)]
    assert written[0] == written[1]
    assert set(written[0]["net.hidden"]["ways"]) == {"width 0.25", "width 0.5"}


def test_statistics_that_training_does_not_track_have_one_grid_for_all_widths(tmp_path: Path) -> None:
    module, ranges = fitted(1, tmp_path, norms="recalibrate")
    assert not input_hook(module.net.hidden).ways
    of_all = [pair for (name, _), (pair,) in ranges.items() if name == "hidden"]
    highest = max(high for _, high in of_all)
    assert len(of_all) == 3
    assert grid_of(module.net.hidden, 0.5).scale == pytest.approx(highest / (2**BITS - 1))


def test_a_layer_that_no_width_narrows_knows_which_width_runs() -> None:
    """The first layer is the same at every width, and its inputs are not."""
    quantizer = InputQuantizer()
    quantizer.set(InputGrid(1.0, 0, 8))
    quantizer.take({"scale": 1.0, "zero_point": 0, "bits": 8, "ways": {"width 0.5": [0.5, 0]}})
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
    give_norms(network, channel_groups(network, torch.zeros(2, 3)), [0.5])
    thin_of(network, 0.5)
    quantizer.attach(network[0])
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    x = torch.full((1, 3), 0.6)
    seen: list[Tensor] = []
    network[0].register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    for width in (1.0, 0.5):
        set_width(network, width)
        network(x)
    assert [float(one[0, 0]) for one in seen] == [1.0, 0.5]
