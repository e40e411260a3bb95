"""Is int8 faster? One network as float32 ONNX and as int8 ONNX, both run by onnxruntime in this process.

The networks train on MNIST for a moment, and a third as long again with weights and inputs quantized. Times are medians
of rounds in which both files take turns; accuracy is of the 10,000 test images.

    python benchmarks/int8_onnx.py --root data/mnist
    python benchmarks/int8_onnx.py --root data/mnist --networks ResNet-20 --activation-bits 4
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTrainingCallback
from lightning_compress.baselines import MNIST, Classifier, DigitsConvNet, LeNet5, ResNet20
from lightning_compress.deploy import capture, fold_quantized, save_onnx
from lightning_compress.quantization.input_grids import input_grids

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-5": LeNet5,
    "4 convolutions, 64 and 128 wide": lambda: DigitsConvNet(width=64, image_size=28),
    "ResNet-20": lambda: ResNet20(in_channels=1),
}
INTEGER = ("QLinearConv", "QGemm", "QLinearAdd", "MatMulIntegerToFloat")
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add")


def fitted(network: nn.Module, data: MNIST, batches: int, callbacks: list[Callback], **options: Any) -> nn.Module:
    seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_epochs": 1, "limit_train_batches": batches, "limit_val_batches": 0}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, **limits, **quiet)
    trainer.fit(Classifier(network.train(), **options), data)
    return network.eval()


class File:
    """An ONNX file and the session that runs it."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(path.with_suffix(".optimized"))
        options.log_severity_level = 3  # it warns that what it optimised is for this machine
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.operators = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: x.numpy()})[0])


def medians(files: list[File], x: Tensor, rounds: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in files]
    for _ in range(rounds + 3):
        for file, mine in zip(files, seconds, strict=True):
            start = time.perf_counter()
            file(x)
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine[3:]) for mine in seconds]


def accuracy(network: Callable[[Tensor], Tensor], data: MNIST) -> float:
    with torch.no_grad():
        right = [(network(x).argmax(1) == y).float().mean() for x, y in data.test_dataloader()]
    return 100 * float(torch.stack(right).mean())


def measure(name: str, data: MNIST, args: argparse.Namespace, folder: Path) -> tuple[list[str], list[list[str]]]:
    x = next(iter(data.train_dataloader()))[0]
    network = fitted(NETWORKS[name](), data, args.batches, [])
    save_onnx(capture(network, x), folder / "float.onnx")
    training = QuantizationAwareTrainingCallback(args.weight_bits, args.activation_bits)
    low = fitted(copy.deepcopy(network), data, args.batches // 3, [training], lr=1e-4)
    fold_quantized(low, x)
    save_onnx(capture(low, x), folder / "int8.onnx", grids=input_grids(low), calibration=x)
    paths = [folder / "float.onnx", folder / "int8.onnx"]
    bytes_float, bytes_int8 = (path.stat().st_size for path in paths)
    rows = []
    for threads in args.threads:
        files = [File(path, threads) for path in paths]
        for size in args.sizes:
            slow, fast = medians(files, torch.randn(size, *x.shape[1:]), args.rounds)
            rows.append([name, str(threads), str(size), f"{1e3 * slow:.3f}", f"{1e3 * fast:.3f}", f"{slow / fast:.2f}"])
    operators = files[1].operators
    summary = [
        name,
        f"{bytes_float:,}",
        f"{bytes_int8:,}",
        f"{bytes_int8 / bytes_float:.3f}",
        *(f"{accuracy(one, data):.2f}" for one in (network, low, files[1])),
        f"{sum(operators[one] for one in INTEGER)} / {sum(operators[one] for one in FLOAT)}",
    ]
    return summary, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batches", type=int, default=150, help="of 128 images, to train on")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64], help="of batches")
    parser.add_argument("--rounds", type=int, default=31)
    args: Any = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = MNIST(args.root, batch_size=128, val_size=0)
    data.prepare_data()
    data.setup()
    files = Table("network", "float32 bytes", "int8 bytes", "ratio", "float32 %", "QAT %", "int8 ONNX %", "int/float")
    times = Table("network", "threads", "batch", "float32 ms", "int8 ms", "times faster")
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            summary, rows = measure(name, data, args, Path(folder))
        files.add_row(*summary)
        for row in rows:
            times.add_row(*row)
    console = Console(width=140)
    console.print(files)
    console.print(times)


if __name__ == "__main__":
    main()
