"""Writes the files of this folder, which later versions must load: a compressed file and a checkpoint of each network.

    PYTHONPATH=.:tests python tests/data/write.py

The files that are here were written before records had kinds. Do not write them again; write others beside them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from support.stored import NETWORKS, outputs
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    save_compressed,
)

CALLBACKS: dict[str, Callback] = {
    "heads": IterativePruningCallback(
        0.4,
        granularity="neuron",
        scope="layer",
        end_epoch=1.0,
        every_n_steps=2,
        shrink="during_fit",
        target=["conv", "layer.linear1", "layer.self_attn.*", "hidden"],
    ),
    "grids": QuantizationAwareTrainingCallback(4, 3),
    "signs": BinaryWeightsCallback(scaling="mean", activations=True, exclude=["head"]),
}


def write(folder: Path) -> None:
    """Train each network for two epochs and write what it has become."""
    for name, make in NETWORKS.items():
        seed_everything(0, verbose=False)
        module = make()
        data = DataLoader(TensorDataset(torch.randn(32, 32), torch.arange(32) % 3), batch_size=8)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, callbacks=[CALLBACKS[name]], enable_model_summary=False, **options
        )
        trainer.fit(module, data)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        save_compressed(module, folder / f"{name}.lcz")
        torch.save(outputs(copy.deepcopy(module)), folder / f"{name}_outputs.pt")


if __name__ == "__main__":
    write(Path(__file__).parent)
