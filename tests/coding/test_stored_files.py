"""Files that an earlier version wrote still load: a cut network, one with inputs on grids, one with sign inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from support.stored import NETWORKS, outputs
from torch import Tensor

from lightning_compress import BinaryWeightsCallback, IterativePruningCallback, QuantizationAwareTrainingCallback
from lightning_compress.coding import load_compressed
from lightning_compress.coding.weights import load_weights

DATA = Path(__file__).parent.parent / "data"
CALLBACKS = {
    "heads": lambda: IterativePruningCallback(0.4, granularity="neuron", shrink="during_fit"),
    "grids": lambda: QuantizationAwareTrainingCallback(4, 3),
    "signs": lambda: BinaryWeightsCallback(scaling="mean", activations=True, exclude=["head"]),
}


def expected(name: str) -> Tensor:
    result: Tensor = torch.load(DATA / f"{name}_outputs.pt", weights_only=True)
    return result


@pytest.mark.parametrize("form", ["lcz", "ckpt"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stored_file_gives_the_network_that_was_saved(name: str, form: str) -> None:
    fresh = NETWORKS[name]()
    assert not torch.equal(outputs(NETWORKS[name]()), expected(name))
    loaded = load_compressed(DATA / f"{name}.{form}", fresh)
    assert loaded is fresh
    assert torch.equal(outputs(loaded), expected(name))


@pytest.mark.parametrize("form", ["lcz", "ckpt"])
@pytest.mark.parametrize("name", ["grids", "signs"])
def test_a_strict_load_of_weights_brings_inputs_along(name: str, form: str) -> None:
    module = NETWORKS[name]()
    load_weights(module, DATA / f"{name}.{form}")
    assert torch.equal(outputs(module), expected(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trainer_with_the_callback_loads_a_stored_checkpoint(name: str) -> None:
    module = NETWORKS[name]()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 32)), batch_size=4)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[CALLBACKS[name]()], **options)
    trainer.test(module, data, ckpt_path=DATA / f"{name}.ckpt", weights_only=True, verbose=False)
    assert torch.equal(outputs(module), expected(name))
