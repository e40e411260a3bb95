"""What a pruned network recovers by: fine-tuning, the learning rate rewound, weights rewound, or weights drawn anew.

ResNet-20 on a part of CIFAR-10. Each seed trains one dense network, for all rows: its checkpoint, from the end of round
0, is resumed by every way of retraining, which prunes the same weights, by magnitude over all layers, and trains on for
the same number of epochs. The learning rate falls to a tenth after a half and after three quarters of a round, so that
fine-tuning goes on with the last one. Hyperparameters are the same for all. The best epoch is never chosen: accuracy is
that of the end. The control is the dense network, of which nothing is pruned, with its learning rate rewound as well.

    python benchmarks/rewinding.py --data data/cifar10 --seeds 0 1 2 --json rewinding.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _rounds import EndOfRound, handed_over
from _support import Found, Setting, accuracies, data_of, initial, trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from mnist_pruning import silence
from rich.console import Console

from lightning_compress import LotteryTicketCallback
from lightning_compress.baselines import Classifier, ResNet20
from lightning_compress.baselines.datamodule import ImageData

WAYS: dict[str, dict[str, Any]] = {
    "fine-tuning": {"rewind": None},
    "learning rate rewound": {"rewind": "learning_rate"},
    "weights rewound": {"rewind": "weights"},
    "weights drawn anew": {"rewind": "weights", "restart": "reinit", "signs": "random"},
}
NOTHING = 1.000001  # a compression by which no weight is pruned, while the round is one like others
CONTROL = "dense, learning rate rewound"
TITLE = "Test accuracy in per cent"


class Stepped(Classifier):
    """SGD with momentum, whose learning rate falls twice in a round."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=1e-4)
        epochs = self.trainer.max_epochs
        assert epochs is not None
        milestones = [epochs // 2, 3 * epochs // 4]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)]


def module_of(setting: Setting, width: int) -> Stepped:
    network = initial(lambda: ResNet20(width=width), setting)
    module = Stepped(network, input_shape=(3, 32, 32), optimizer="sgd", lr=setting.lr).train()
    return module.to(memory_format=torch.channels_last)  # trains faster


def ticket_of(arguments: argparse.Namespace, compression: float, **way: Any) -> LotteryTicketCallback:
    return LotteryTicketCallback(
        amount=1 - 1 / compression,
        rounds=arguments.rounds,
        round_epochs=arguments.epochs,
        rewind_to=arguments.rewind_to,
        **way,
    )


def fit(
    setting: Setting, arguments: argparse.Namespace, data: ImageData, *callbacks: Any, resume: Path | None = None
) -> Stepped:
    """Train all rounds, or round 0 alone where there is nothing to resume."""
    later = arguments.rounds * (arguments.epochs - arguments.rewind_to)
    whole = arguments.epochs + later
    module = module_of(setting, arguments.width)
    seed_everything(setting.seed, verbose=False)
    options: dict[str, Any] = {"callbacks": list(callbacks), "enable_checkpointing": resume is None}
    trainer(setting, whole, **options).fit(
        module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None
    )
    return module.eval()


def one_seed(found: Found, arguments: argparse.Namespace, setting: Setting, folder: Path) -> None:
    data = data_of(setting)
    writer = ticket_of(arguments, 2.0, rewind="weights")
    start = time.perf_counter()
    save = EndOfRound(folder, arguments.epochs)
    module = fit(setting, arguments, data, writer, save)
    dense = 100 * accuracies(module, data, setting)["test_acc"]
    print(f"seed {setting.seed}: dense {dense:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    columns = [f"{compression}x" for compression in arguments.compressions]
    found.add(TITLE, "dense", **dict.fromkeys(columns, dense))
    for compression, column in [(NOTHING, ""), *zip(arguments.compressions, columns, strict=True)]:
        for name, way in WAYS.items() if column else [(CONTROL, WAYS["learning rate rewound"])]:
            if arguments.only and name not in arguments.only:
                continue
            start, reader = time.perf_counter(), ticket_of(arguments, compression, **way)
            module = fit(setting, arguments, data, reader, resume=handed_over(save.path, writer, reader))
            after = 100 * accuracies(module, data, setting)["test_acc"]
            found.add(TITLE, name, **dict.fromkeys([column] if column else columns, after))
            neurons = sum(
                int((weight.flatten(1) == 0).all(1).sum()) for weight in module.parameters() if weight.dim() == 4
            )
            if column:
                found.add("Filters without a weight", name, **{column: neurons})
            seconds = time.perf_counter() - start
            said = f"{name}: {after:.2f} % with {1 - reader.sparsity:.1%} left"
            print(
                f"seed {setting.seed}, {compression:.3g}x: {said}, {neurons} empty filters, {seconds:.0f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10, help="of round 0")
    parser.add_argument("--rewind-to", type=int, default=1, help="the epoch at which later rounds begin")
    parser.add_argument("--rounds", type=int, default=1, help="how often the network is pruned")
    parser.add_argument("--compressions", type=float, nargs="+", default=[4.8, 7.5])
    parser.add_argument("--only", nargs="+", choices=[*WAYS, CONTROL], help="rows; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--json", type=Path, help="write the numbers here after every seed")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    found, start = Found(), time.perf_counter()
    for seed in arguments.seeds:
        setting = Setting(
            "cifar10",
            arguments.data,
            arguments.epochs,
            arguments.batch,
            arguments.lr,
            seed,
            images=arguments.images,
            quick=arguments.quick,
        )
        with tempfile.TemporaryDirectory() as folder:
            one_seed(found, arguments, setting, Path(folder))
        found.show(Console(width=120), arguments.json)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
