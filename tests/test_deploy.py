from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_compress.deploy.onnx_file as onnx_file
from lightning_compress.deploy import capture, save_onnx, save_program


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
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 2, 11):
        inputs = batch(size)
        expected = model(**inputs)["logits"]
        torch.testing.assert_close(loaded(**inputs)["logits"], expected)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected)


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
