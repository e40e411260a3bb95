"""The file of weights from a seed: a seed and a mask, and plain weights as soon as these are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding import files
from lightning_compress.core.seeded import Seeded
from lightning_compress.supermask import SupermaskWeights, note_origins, start_from


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10))


def masked(init: str, method: str = "signed", rescale: str = "none", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = make().to(dtype)
    amounts = {"0.weight": 0.8, "2.weight": 0.5}
    note_origins(net, start_from(net, amounts, init, seed=11, rescale=rescale))
    SupermaskWeights(net, amounts, method=method, per_kept=rescale == "dynamic")
    return net


@pytest.mark.parametrize("coder", ["ans", "huffman", "none"])
@pytest.mark.parametrize("rescale", ["none", "fan", "dynamic"])
@pytest.mark.parametrize("init", ["signed_constant", "uniform"])
def test_a_file_has_a_mask_and_reads_the_same_bits(init: str, rescale: str, coder: str, tmp_path: Path) -> None:
    net = masked(init, rescale=rescale)
    size = save_compressed(net, tmp_path / "net.lcz", coder=coder)
    state = load_compressed(tmp_path / "net.lcz")
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value)
    (first, _, second, _) = size.tensors
    assert first.encoding.startswith("weights from a seed")
    # 80 % zeros have 0.72 bits of entropy, and each of the other 20 % a sign
    assert first.bits_per_weight < 1.3
    assert second.bits_per_weight < 1.9
    assert (tmp_path / "net.lcz").read_bytes()[3] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    net = masked("uniform", "edge_popup", dtype=dtype)
    size = save_compressed(net, tmp_path / "net.lcz")
    assert size.tensors[0].encoding.startswith("weights from a seed")
    other = load_compressed(tmp_path / "net.lcz", make().to(dtype))
    assert torch.equal(other[0].weight, net[0].weight)


def test_a_dtype_without_arithmetic_is_written_as_it_is(tmp_path: Path) -> None:
    state = masked("uniform").state_dict()
    for name, value in list(state.items()):
        state[name] = value.to(torch.float8_e4m3fn)
    save_compressed(state, tmp_path / "net.lcz")
    assert (tmp_path / "net.lcz").read_bytes()[3] == 2
    assert torch.equal(load_compressed(tmp_path / "net.lcz")["0.weight"].float(), state["0.weight"].float())


def test_a_loaded_network_is_saved_as_small_again(tmp_path: Path) -> None:
    first = save_compressed(masked("uniform"), tmp_path / "a.lcz").bytes
    assert save_compressed(load_compressed(tmp_path / "a.lcz", make()), tmp_path / "b.lcz").bytes == first
    assert (tmp_path / "a.lcz").read_bytes() == (tmp_path / "b.lcz").read_bytes()


def test_trained_weights_are_written_as_they_are(tmp_path: Path) -> None:
    net = masked("uniform")
    seeded = save_compressed(net, tmp_path / "a.lcz")
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-3  # a single weight
    size = save_compressed(net, tmp_path / "b.lcz")
    assert not size.tensors[0].encoding.startswith("weights from a seed")
    assert size.tensors[2].encoding == seeded.tensors[2].encoding
    state = load_compressed(tmp_path / "b.lcz")
    assert torch.equal(state["0.weight"], net[0].weight)
    assert torch.equal(state["2.weight"], net[2].weight)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for parameter in net.parameters():
        parameter.data.add_(0.01)
    save_compressed(net, tmp_path / "c.lcz")
    assert (tmp_path / "c.lcz").read_bytes()[3] == 2  # any earlier version reads it
    assert torch.equal(load_compressed(tmp_path / "c.lcz")["2.weight"], net[2].weight)


def test_own_weights_need_no_record(tmp_path: Path) -> None:
    net = masked("as_is")
    assert not any("lightning_compress.structure" in one for one in net.state_dict()._metadata.values())
    save_compressed(net, tmp_path / "net.lcz")
    assert torch.equal(load_compressed(tmp_path / "net.lcz")["0.weight"], net[0].weight)


def test_a_record_of_another_form_is_a_corrupt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = masked("uniform").state_dict()
    path = tmp_path / "net.lcz"
    save_compressed(state, path)
    crafted = state._metadata["2"]["lightning_compress.structure"]["seeded"]["origins"]["weight"]
    assert crafted == {"seed": 11, "stream": 1, "init": "uniform", "scale": (6 / 40) ** 0.5, "per_kept": False}
    original = files.without_weights

    def worse(*given: Any) -> Any:
        header, tensors, masks = original(*given)
        header.metadata["2"]["lightning_compress.structure"]["seeded"]["origins"]["weight"]["seed"] = -1
        return header, tensors, masks

    monkeypatch.setattr(files, "without_weights", worse)
    save_compressed(state, path)
    with pytest.raises(CorruptFileError, match=r"the seed of '2\.weight'"):
        load_compressed(path)


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox 4x64 with 10 rounds, as Salmon et al. 2011 write it, by Python's integers."""
    mask, found, counter = 2**64 - 1, [], 0
    while len(found) < count:
        counter += 1  # numpy counts before the first block
        x, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [(b >> 64) ^ x[1] ^ k[0], b & mask, (a >> 64) ^ x[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        found += x
    return found[:count]


def test_weights_from_a_seed_by_integers_of_python() -> None:
    raw = philox((2**63 + 5, 3), 11)
    origin = Seeded(seed=2**63 + 5, stream=3, init="uniform", scale=0.1)
    scale = np.float32(0.1)
    expected = [np.float32((2 * (one >> 40) + 1 - 2**24) / 2**24) * scale for one in raw]
    assert origin.weights((11,)).tolist() == [float(one) for one in expected]
    signs = Seeded(seed=2**63 + 5, stream=3, init="signed_constant", scale=0.1).weights((11,))
    assert signs.sign().tolist() == [1.0 if one >> 63 else -1.0 for one in raw]


def test_weights_have_the_variance_of_kaiming() -> None:
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ConvTranspose2d(64, 32, 3, groups=4))
    start_from(net, {"0.weight": 0.5, "1.weight": 0.5}, "uniform", seed=1)
    for layer, fan_in in zip(net, (72, 144), strict=True):
        assert float(layer.weight.var()) == pytest.approx(2 / fan_in, rel=0.05)
        assert abs(float(layer.weight.mean())) < 0.01


def test_a_parametrization_takes_a_parameter_out_of_the_record() -> None:
    net = masked("signed_constant")
    nn.utils.parametrizations.weight_norm(net[0])
    copied = make()
    nn.utils.parametrizations.weight_norm(copied[0])
    copied.load_state_dict(net.state_dict())
    assert torch.equal(copied[0].weight, net[0].weight)


@pytest.mark.parametrize("scale", [1e39, 1e-60])
def test_a_scale_that_float32_cannot_hold_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be above 0 and finite in float32"):
        Seeded(seed=1, stream=0, init="uniform", scale=scale)
