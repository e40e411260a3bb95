"""Not too much at once? LeNet-300-100 on MNIST, pruned in one go and little by little from the same dense network.

Both get the same number of epochs. "Right after" is the error at the moment the final mask is set, before recovery.

    python benchmarks/one_shot_or_iterative.py --seeds 0 1 2 --root data/mnist
"""

from __future__ import annotations

import argparse
import copy
import statistics

from lightning.pytorch import LightningModule, seed_everything
from mnist_pruning import compose, fit, silence
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_compress import IterativePruningCallback
from lightning_compress.hydra import build_datamodule, build_module, build_trainer_factory
from lightning_compress.tasks.history import Recorder

LEFT = {"12x": 22_183, "56x": 4_753}
WEIGHTS, EPOCHS = 266_200, 12


def pruned(cfg: DictConfig, dense: LightningModule, left: int, *, one_shot: bool) -> tuple[float, float]:
    """Return the error right after the final mask, and at the end."""
    module, recorder = copy.deepcopy(dense), Recorder("val_acc")
    pruning = IterativePruningCallback(
        1 - left / WEIGHTS,
        schedule="one_shot" if one_shot else "cubic",
        end_epoch=None if one_shot else EPOCHS / 2,
        every_n_steps=100,
    )
    after = fit(cfg, module, [pruning, recorder], max_epochs=EPOCHS)["error"]
    snapshot = copy.deepcopy(dense)
    snapshot.load_state_dict(recorder.snapshot)
    trainer = build_trainer_factory(cfg)(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return 100 * (1 - trainer.test(snapshot, build_datamodule(cfg), verbose=False)[0]["test_acc"]), after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="data/mnist")
    arguments = parser.parse_args()
    silence()
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    dense_errors = []
    for seed in arguments.seeds:
        cfg = compose("model=lenet300", "data=mnist", f"data.root={arguments.root}", f"seed={seed}")
        seed_everything(seed, verbose=False)
        dense = build_module(cfg)
        dense_errors.append(fit(cfg, dense, [], max_epochs=EPOCHS)["error"])
        for name, left in LEFT.items():
            for way in ("one-shot", "iterative"):
                found = pruned(cfg, dense, left, one_shot=way == "one-shot")
                errors.setdefault((name, way), []).append(found)

    table = Table("LeNet-300-100, MNIST, error %", "right after the mask", "after fine-tuning", "by seed")
    table.add_row("dense", "", f"{statistics.median(dense_errors):.2f}", " ".join(f"{e:.2f}" for e in dense_errors))
    for (name, way), found in errors.items():
        before, after = zip(*found, strict=True)
        by_seed = " ".join(f"{error:.2f}" for error in after)
        table.add_row(f"{name} {way}", f"{statistics.median(before):.2f}", f"{statistics.median(after):.2f}", by_seed)
    Console().print(table)


if __name__ == "__main__":
    main()
