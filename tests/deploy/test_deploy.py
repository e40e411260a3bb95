from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lightning_compress.deploy.onnx_file as onnx_file
from lightning_compress.baselines.networks import ResidualBlock
from lightning_compress.core.select import WEIGHT_LAYERS
from lightning_compress.deploy import capture, fold_quantized, save_onnx, save_program
from lightning_compress.quantization.grids import on_symmetric_grid, weight_scales
from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head((self.embed(ids) * mask[..., None]).mean(1))}


def batch(size: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(9, (size, 6)), "mask": torch.rand(size, 6)}


def test_keyword_inputs_and_dict_outputs_of_any_batch_size(tmp_path: Path) -> None:
    model = TwoInputs()
    program = capture(model, batch(1))
    save_program(program, tmp_path / "model.pt2")
    save_onnx(program, tmp_path / "model.onnx")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 2, 11):
        inputs = batch(size)
        expected = model(**inputs)["logits"]
        torch.testing.assert_close(loaded(**inputs)["logits"], expected)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected)


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, *args: Tensor) -> Tensor:
        return self.net(args[0] + args[-1])


class Keywords(Star):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(inputs["x"] - inputs["y"])


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (Star(), lambda n: torch.randn(n, 8)),
        (Star(), lambda n: (torch.randn(n, 8), torch.randn(n, 8))),
        (Keywords(), lambda n: {"x": torch.randn(n, 8), "y": torch.randn(n, 8)}),
    ],
)
def test_a_forward_may_take_what_it_gets(model: nn.Module, make: Any, tmp_path: Path) -> None:
    program = capture(model, make(2))
    assert "forward" not in vars(model)
    save_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 5):
        inputs = make(n)
        args, kwargs = (
            ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        )
        expected = model(*args, **kwargs)
        torch.testing.assert_close(program.module()(*args, **kwargs), expected)
        names = [one.name for one in session.get_inputs()]
        feed = dict(zip(names, (one.numpy() for one in (*args, *kwargs.values())), strict=True))
        torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected)


class Attending(nn.Module):
    """Of sentences, with an attention mask over pairs of positions, which has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def sentences(n: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(9, (n, length)), "mask": torch.ones(length, length).triu(1).bool()}


@pytest.mark.parametrize(("n", "length"), [(1, 5), (5, 5)])
def test_an_input_without_a_batch_stays_as_it_is(n: int, length: int) -> None:
    model = Attending().eval()
    program = capture(model, sentences(n, length))
    for size in (1, 3, 7):
        inputs = sentences(size, length)
        torch.testing.assert_close(program.module()(**inputs), model(**inputs))


def test_other_lengths_are_computed_where_they_are_named(tmp_path: Path) -> None:
    model = TwoInputs().eval()
    named = {"ids": {1: "length"}, "mask": {-1: "length"}}
    program = capture(model, batch(4), dynamic=named)
    save_onnx(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for n, length in ((1, 6), (3, 17), (4, 2)):
        inputs = {"ids": torch.randint(9, (n, length)), "mask": torch.rand(n, length)}
        expected = model(**inputs)["logits"]
        torch.testing.assert_close(program.module()(**inputs)["logits"], expected)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected)
    positional = capture(model, tuple(batch(4).values()), dynamic={0: {1: "length"}, "mask": {1: "length"}})
    assert positional.module()(torch.randint(9, (3, 8)), torch.rand(3, 8))["logits"].shape == (3, 2)
    for wrong, words in (
        ({"idz": {1: "length"}}, "'idz', no tensor among the inputs: expected one of 'ids', 'mask'"),
        ({"ids": {2: "n"}}, r"dimension 2 of 'ids', whose shape is \(4, 6\)"),
    ):
        with pytest.raises(ValueError, match=words):
            capture(model, batch(4), dynamic=wrong)


class Positional(nn.Module):
    """No longer than its table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 4))
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.positions[: ids.shape[1]]


def test_the_longest_inputs_may_be_the_example() -> None:
    model = Positional()
    program = capture(model, torch.randint(9, (2, 6)), dynamic={"ids": {1: "length"}})
    for length in (2, 4, 6):
        ids = torch.randint(9, (3, length))
        torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch.export knows no vmap, which the model's masks are made by"
)
def test_a_language_model_is_captured_without_its_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    program = capture(model, {"input_ids": torch.randint(16, (2, 5))})
    assert config.use_cache
    ids = torch.randint(16, (3, 5))
    torch.testing.assert_close(
        program.module()(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )


def test_the_model_keeps_its_mode_and_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout())
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = capture(model, torch.rand(4, 1, 5, 5))
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    inputs = torch.rand(3, 1, 5, 5)
    torch.testing.assert_close(program.module()(inputs), model.eval()(inputs))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def test_a_program_that_computes_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="computes something else than the model"):
        capture(Noise(), torch.ones(2, 3))


def test_a_missing_extra_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(nn.Linear(2, 1), torch.ones(2, 2))
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"onnxscript.*pip install 'lightning-compress\[deploy\]'"):
        save_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def quantize(model: nn.Module, x: Tensor, bits: int = 8) -> nn.Module:
    """Weights on grids of one scale per output channel, and inputs of layers on the range that x spans."""
    grids = {}
    handles = []
    for name, layer in model.eval().named_modules():
        if isinstance(layer, WEIGHT_LAYERS):
            grid_weight(layer, bits)
            handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: grids.update({name: args[0]})))
    model(x)
    for handle in handles:
        handle.remove()
    covering = {name: InputGrid.covering(float(seen.min()), float(seen.max()), bits) for name, seen in grids.items()}
    quantize_inputs(model, covering)
    return model


def grid_weight(layer: nn.Module, bits: int = 8) -> None:
    groups = layer.groups if isinstance(layer, nn.ConvTranspose2d) else None
    scales = weight_scales(layer.weight, bits, groups=groups)
    layer.weight.data = on_symmetric_grid(layer.weight.data, scales, bits, groups=groups)


def operators(path: Path) -> Counter[str]:
    """What onnxruntime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def stored(path: Path) -> dict[str, Any]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "BatchNormalization", "Add"}


def test_a_residual_network_runs_in_integers_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = ResidualBlock(3, 8, stride=2), ResidualBlock(8, 8)
    model, x = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), torch.randn(32, 3, 8, 8)
    for _ in range(3):
        model(x)  # statistics for the norms
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)  # of both signs
    expected = quantize(model, x)(x).detach()
    fold_quantized(model, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.05 * float(expected.std()))
    save_onnx(capture(model, x), tmp_path / "int8.onnx", grids=input_grids(model), calibration=x)
    found = operators(tmp_path / "int8.onnx")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (5, 2, 1)
    assert not FLOAT & found.keys()
    outputs = torch.cat([run(tmp_path / "int8.onnx", x[:1]), run(tmp_path / "int8.onnx", x[1:])])
    assert float((outputs - expected).std() / expected.std()) < 0.05
    kinds = {name: value.dtype.name for name, value in stored(tmp_path / "int8.onnx").items() if value.ndim > 1}
    assert list(kinds.values()) == ["int8"] * 6
    assert not any("BatchNorm" in node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)


def test_inputs_of_two_bits_are_clipped_at_their_own_levels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    model[0].weight.data.fill_(1.0)
    grid = InputGrid(scale=0.5, zero_point=1, bits=2)
    quantize_inputs(model, {"0": grid})
    x = torch.linspace(-3, 3, 40)[:, None]
    save_onnx(capture(model, x), tmp_path / "model.onnx", grids={"0": grid})
    found = run(tmp_path / "model.onnx", x)
    assert sorted(set(found.flatten().tolist())) == [-0.5, 0.0, 0.5, 1.0]
    assert torch.equal(found, model(x))


class Mixed(nn.Module):
    """Kinds of layers, one of them called twice, in sequence and on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.up, self.grouped = (
            nn.Linear(6, 6),
            nn.ConvTranspose2d(4, 4, 2),
            nn.ConvTranspose2d(4, 4, 2, 2, groups=2),
        )
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.up(self.twice(torch.tanh(self.twice(x)))))


def test_other_layers_compute_what_the_model_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(8, 4, 6, 6)
    quantize(model, x)
    grids = input_grids(model) | {"unused": InputGrid(scale=1.0, zero_point=0, bits=8)}
    with caplog.at_level(logging.WARNING):
        save_onnx(capture(model, x), tmp_path / "model.onnx", grids=grids)
    assert [record.message for record in caplog.records if record.name.startswith("lightning_compress")] == [
        "These layers are not plain linear layers or convolutions in the exported program, so they compute in float: "
        "unused.",
        "The inputs of these layers are quantized, but their weights stay float, because they are not integers times a "
        "scale per output channel, or because int8 has no form for such a layer: grouped.weight (ConvTranspose).",
    ]
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), model(x), rtol=0, atol=0.02)
    assert operators(tmp_path / "model.onnx")["MatMulIntegerToFloat"] == 2
    assert stored(tmp_path / "model.onnx")["up.weight.integers"].dtype == "int8"


def test_weights_are_stored_as_integers_and_lose_nothing_and_alone_they_stay_float(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5)).eval(), torch.randn(4, 2, 6, 6)
    grid_weight(model[0])
    save_onnx(capture(model, x), tmp_path / "float.onnx")
    assert stored(tmp_path / "float.onnx")["0.weight"].dtype == "float32"
    quantize_inputs(model, {"2": InputGrid(scale=0.02, zero_point=128, bits=8)})
    save_onnx(capture(model, x), tmp_path / "model.onnx", grids=input_grids(model))
    found = stored(tmp_path / "model.onnx")
    assert (found["0.weight.integers"].dtype, found["2.weight"].dtype) == ("int8", "float32")
    weight = found["0.weight.integers"] * found["0.weight.scales"][:, None, None, None]
    assert torch.equal(torch.from_numpy(weight), model[0].weight.detach())


def test_a_float_network_is_as_it_was(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), torch.randn(4, 2, 6, 6)
    assert isinstance(fold_quantized(model, x)[1], nn.BatchNorm2d)
    save_onnx(capture(model, x), tmp_path / "model.onnx", grids=input_grids(model), calibration=x)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node
    }


def test_a_channel_that_the_norm_silenced_keeps_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
        torch.rand(8, 2, 8, 8),
    )
    model[1].weight.data = torch.tensor([1.0, 0.0, 1e-12, -1.0])  # in units of 1e-14, a bias of 3 is no int32
    model[1].bias.data = torch.tensor([0.0, 2.0, 3.0, 1.0])
    quantize(model, x)
    expected = model(x)
    fold_quantized(model, x)
    save_onnx(capture(model, x), tmp_path / "model.onnx", grids=input_grids(model))
    assert operators(tmp_path / "model.onnx")["QLinearConv"] == 1
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), expected, rtol=0, atol=0.02)


def test_grids_of_another_model_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    program = capture(quantize(model, x), x)
    wrong = {"0": InputGrid(scale=4 * input_grids(model)["0"].scale, zero_point=0, bits=8)}
    with pytest.raises(ValueError, match=r"computes something else .* the grids are those of the model"):
        save_onnx(program, tmp_path / "model.onnx", grids=wrong)
    assert not list(tmp_path.iterdir())


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1.05 + 0.02)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        nn.Sequential(Shifted(4, 6), nn.Flatten(), nn.Linear(24, 3)),
    ],
    ids=["padding", "own forward"],
)
def test_what_a_layer_computes_before_its_product_stays(
    model: nn.Sequential, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(8, 1, 4, 4)
    quantize_inputs(model.eval(), {"0": InputGrid(scale=0.03, zero_point=128, bits=8)})
    save_onnx(capture(model, x), tmp_path / "model.onnx", grids=input_grids(model))
    assert "so they compute in float: 0" in caplog.text
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), model(x))
