"""Supermasks of a random LeNet-300-100 without biases on MNIST: no weight is trained.

    python benchmarks/supermask.py --data data/mnist --seeds 0 1 2

Beside the methods: the dense network trained, a random mask (the control), and the file of a pruned and clustered
network, whose weights are trained, next to the file with a seed and a mask.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _support import Setting, accuracies, classifier, data_of, fit, initial
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import (
    IterativePruningCallback,
    SupermaskCallback,
    WeightClusteringCallback,
    load_compressed,
    save_compressed,
)
from lightning_compress.baselines import Classifier
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.supermask import entries_kept, same_sign, sampled

SHAPE = (1, 28, 28)
LEFT_4 = {"*5": 0.5, "*3": 0.93, "*": 0.966}  # 3.98 % of 266,200 weights remain


def network(width: float = 1) -> nn.Sequential:
    sizes = [784, round(300 * width), round(100 * width), 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for first, second in pairwise(sizes):
        layers += [nn.Linear(first, second, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make(setting: Setting, width: float = 1, **recipe: Any) -> Classifier:
    return classifier(initial(lambda: network(width), setting), setting, SHAPE, **recipe)


def tested(module: Classifier, data: ImageData, setting: Setting) -> float:
    return 100 * accuracies(module, data, setting)["test_acc"]


def left(module: nn.Module) -> float:
    weights = list(module.parameters())
    return 100 * sum(int(one.count_nonzero()) for one in weights) / sum(one.numel() for one in weights)


def written(module: Classifier, data: ImageData, setting: Setting) -> dict[str, float]:
    """Test the network that another process would read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.lcz"
        size = save_compressed(module.network, path).bytes
        again = classifier(load_compressed(path, network(module.network[1].out_features / 300)), setting, SHAPE)
    return {"accuracy": tested(again, data, setting), "left": left(again.network), "bytes": size}


def learned(
    callbacks: Sequence[Callback], data: ImageData, setting: Setting, epochs: int, width: float = 1, **recipe: Any
) -> tuple[Classifier, dict[str, float]]:
    module = make(setting, width, **({"optimizer": "adam", "lr": 0.003, "weight_decay": 0.0} | recipe))
    fit(module, data, setting, epochs=epochs, callbacks=callbacks)
    return module, written(module, data, setting)


def without_training(dense: Classifier, data: ImageData, setting: Setting) -> dict[str, float]:
    """The mask of the largest weights that kept their sign, over signed constants; its size is chosen in validation.

    Half of the last layer may remain, as it is pruned at half the rate in the paper.
    """
    start = make(setting)
    first, trained = [list(one.network.parameters()) for one in (start, dense)]
    best: tuple[float, list[Tensor]] | None = None
    for share in (0.02, 0.04, 0.08, 0.12, 0.2, 0.3, 0.45):
        masks = [
            same_sign(w.detach(), t.detach(), entries_kept(1 - (max(share, 0.5) if len(w) == 10 else share), w.numel()))
            for w, t in zip(first, trained, strict=True)
        ]
        hold(start, [w.detach().sign() * math.sqrt(2 / w.shape[1]) for w in first], masks)
        found = validated(start, data)
        if best is None or found > best[0]:
            best = found, [one.detach().clone() for one in start.network.parameters()]
        start = make(setting)
        first = list(start.network.parameters())
    assert best is not None
    hold(start, best[1], [torch.ones_like(one) for one in best[1]])
    return {"accuracy": tested(start, data, setting), "left": left(start.network)}


@torch.no_grad()
def hold(module: Classifier, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    for parameter, weight, mask in zip(module.network.parameters(), weights, masks, strict=True):
        parameter.copy_(weight * mask)


@torch.no_grad()
def validated(module: Classifier, data: ImageData) -> float:
    batches = [(module.eval()(x).argmax(1) == y) for x, y in data.val_dataloader()]
    return float(torch.cat(batches).float().mean())


def of_samples(callback: SupermaskCallback, module: Classifier, data: ImageData, setting: Setting) -> dict[str, Any]:
    """The kept sample of a Bernoulli mask beside ten others, and beside the most probable weights."""
    mine: Any = callback._weights
    names, rows = list(mine.latent), []
    kept = [module.get_parameter(name).detach().clone() for name in names]
    weights = [mine.initial[name] for name in names]
    for _ in range(10):
        hold(module, weights, [sampled(mine.latent[name]) for name in names])
        rows.append(tested(module, data, setting))
    hold(module, weights, [(mine.latent[name] > 0).float() for name in names])
    probable = tested(module, data, setting)
    hold(module, kept, [torch.ones_like(one) for one in kept])
    return {"samples": statistics.mean(rows), "spread": statistics.pstdev(rows), "most probable": probable}


def of_seed(setting: Setting) -> dict[str, dict[str, Any]]:
    data, found, began = data_of(setting), {}, time.process_time()
    e = setting.epochs

    def note(name: str, result: dict[str, Any]) -> None:
        nonlocal began
        found[name] = result | {"seconds": time.process_time() - began}
        began = time.process_time()
        print(f"seed {setting.seed}, {name}: {found[name]}", flush=True)

    edge: dict[str, Any] = {"seed": setting.seed, "init": "signed_constant", "rescale": "fan"}
    signed = SupermaskCallback(LEFT_4, method="signed", **edge)
    note("signed, 4 % left", learned([signed], data, setting, 2 * e)[1])
    note("edge-popup", learned([SupermaskCallback(0.5, **edge)], data, setting, 2 * e)[1])
    sampling = SupermaskCallback(0.5, method="bernoulli", **edge)
    module, result = learned([sampling], data, setting, 3 * e)
    note("Bernoulli (Zhou)", result | of_samples(sampling, module, data, setting))
    dense, result = learned([], data, setting, e, lr=0.0012)
    note("dense, trained", result)
    note("heuristic, no training of the mask", without_training(dense, data, setting))
    pruned: list[Callback] = [
        IterativePruningCallback(0.97, end_epoch=1.2 * e, every_n_steps=50),
        WeightClusteringCallback(8, start_epoch=1.6 * e),
    ]
    note("pruned to 3 % and clustered, trained", learned(pruned, data, setting, 2 * e)[1])
    note("edge-popup, 2x wide", learned([SupermaskCallback(0.5, **edge)], data, setting, 2 * e, width=2)[1])
    control = make(setting)
    hold(control, list(control.network.parameters()), [torch.rand_like(p) < 0.5 for p in control.network.parameters()])
    note("random mask, half left", {"accuracy": tested(control, data, setting), "left": left(control.network)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument(
        "--epochs", type=int, default=5, help="of dense training; masks take two or three times as many"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="a file that gets the numbers of all seeds")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    rows: dict[int, Any] = {}
    for seed in arguments.seeds:
        rows[seed] = of_seed(
            Setting(
                dataset="mnist",
                folder=arguments.data,
                epochs=1 if arguments.quick else arguments.epochs,
                batch=128,
                lr=0.1,
                seed=seed,
                quick=arguments.quick,
            )
        )
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=1))
    table = Table("LeNet-300-100 without biases, MNIST", "test accuracy, median", "of each seed", "% left", "bytes")
    for name in rows[arguments.seeds[0]]:
        those = [one[name] for one in rows.values()]
        shares = [one["accuracy"] for one in those]
        table.add_row(
            name,
            f"{statistics.median(shares):.2f} %",
            " ".join(f"{one:.2f}" for one in shares),
            f"{statistics.median(one['left'] for one in those):.2f}",
            f"{statistics.median(one['bytes'] for one in those):,.0f}" if "bytes" in those[0] else "",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
