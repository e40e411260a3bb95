"""The compressed file: entropy coding against the entropy, 100 million weights in and out, bytes of every encoding.

All weights are synthetic, all rows of one run; speeds are those of the best of the repeats, the methods taking turns.

    python benchmarks/coding.py --symbols 1e7 --weights 1e8 --repeats 3
    python benchmarks/coding.py --only many_tensors --repeats 5
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.ans import AnsReader, AnsWriter
from lightning_compress.coding.bits import HuffmanReader, HuffmanWriter

LENET300 = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
LENET5 = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}


def seconds(work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    found = []
    for _ in range(repeats):
        start = clock()
        work()
        found.append(clock() - start)
    return min(found)


def entropy_coding(count: int, repeats: int) -> Table:
    table = Table(title=f"{count:,} symbols of an alphabet of 32, normally distributed")
    for column in ("coder", "above the entropy", "in", "out"):
        table.add_column(column, justify="left" if column == "coder" else "right")
    shares = np.exp(-0.5 * np.linspace(-2.5, 2.5, 32) ** 2)
    symbols = np.random.default_rng(0).choice(32, count, p=shares / shares.sum()).astype(np.uint8)
    counts = np.bincount(symbols)
    entropy = float(-(counts * np.log2(counts / count)).sum())
    lookup = np.arange(32, dtype=np.uint8)
    for name, writer_of, reader_of in (("ans", AnsWriter, AnsReader), ("huffman", HuffmanWriter, HuffmanReader)):
        parts: list[bytes] = []

        def encode(make: type[AnsWriter | HuffmanWriter] = writer_of, into: list[bytes] = parts) -> None:
            writer = make()
            writer.coded(symbols, 32)
            into[:] = [writer.finish(), b"".join(writer.raw_pieces())]

        def decode(make: type[AnsReader | HuffmanReader] = reader_of, parts: list[bytes] = parts) -> list[np.ndarray]:
            return list(make(memoryview(parts[0]), memoryview(parts[1])).coded(count, lookup))

        coded, decoded = seconds(encode, repeats), seconds(decode, repeats)
        assert np.array_equal(np.concatenate(decode()), symbols)
        over = 8 * sum(map(len, parts)) / entropy - 1
        table.add_row(name, f"{over:.3%}", f"{count / coded / 1e6:.0f} M/s", f"{count / decoded / 1e6:.0f} M/s")
    return table


def clustered(shape: tuple[int, ...], clusters: int, left: float, generator: torch.Generator) -> Tensor:
    """Normal weights, the largest `left` of them, and each the mean of its equally frequent cluster."""
    weight = torch.randn(shape, generator=generator)
    if left < 1:
        weight[weight.abs() <= weight.abs().flatten().sort().values[round((1 - left) * weight.numel()) - 1]] = 0
    if clusters:
        there = weight != 0
        values = weight[there]
        edges = values.sort().values[torch.linspace(0, len(values) - 1, clusters + 1).long()]
        index = torch.bucketize(values, edges[1:-1])
        means = torch.zeros(clusters).index_add_(0, index, values) / torch.bincount(index, minlength=clusters)
        weight[there] = means[index]
    return weight


def large(count: int, repeats: int) -> Table:
    table = Table(title=f"{count:,} weights in one file, save and load, against torch in float32")
    for column in ("weights", "file", "torch", "ours", "times torch"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(16, generator=generator).sort().values
    shares = torch.exp(-0.5 * torch.linspace(-2.5, 2.5, 16) ** 2)
    index = torch.multinomial(shares, min(count, 1 << 20), replacement=True, generator=generator)
    dense = means[index].repeat(-(-count // len(index)))[:count]
    pruned = dense * (torch.rand(count, generator=generator) < 0.1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for name, weight in (("16 clusters", dense), ("16 clusters, 10 % left", pruned)):
            peer, ours = [], []
            for _ in range(repeats):
                peer.append(seconds(lambda one=weight: (torch.save({"w": one}, path), torch.load(path)), 1))
                ours.append(seconds(lambda one=weight: (save_compressed({"w": one}, path), load_compressed(path)), 1))
            assert torch.equal(load_compressed(path)["w"], weight)
            table.add_row(
                *(name, f"{path.stat().st_size:,} B", f"{min(peer):.2f} s", f"{min(ours):.2f} s"),
                f"{min(ours) / min(peer):.1f}",
            )
    return table


def resnet152() -> dict[str, Tensor]:
    """Tensors named and shaped as those of torchvision's ResNet-152, 932 of them, as random as trained ones."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, norm: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{kind}"] = torch.randn(shape[0], generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(12_345)

    conv("conv1", "bn1", 64, 3, 7, 7)
    channels = 64
    for stage, blocks in enumerate((3, 8, 36, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            conv(f"{name}.conv1", f"{name}.bn1", width, channels, 1, 1)
            conv(f"{name}.conv2", f"{name}.bn2", width, width, 3, 3)
            conv(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1, 1)
            if block == 0:
                conv(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, channels, 1, 1)
            channels = 4 * width
    state["fc.weight"] = torch.randn(1000, channels, generator=generator)
    state["fc.bias"] = torch.randn(1000, generator=generator)
    return state


def many_tensors(repeats: int) -> Table:
    state = resnet152()
    size = sum(tensor.nbytes for tensor in state.values())
    table = Table(title=f"ResNet-152, {len(state)} tensors of random floats, {size / 1e6:.0f} MB: seconds of processor")
    for column in ("", "save", "load", "both", "times torch"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "torch": (lambda: torch.save(state, path), lambda: torch.load(path)),
            "ours": (lambda: save_compressed(state, path), lambda: load_compressed(path)),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (save, load) in ways.items():
                found[name].append((seconds(save, 1, time.process_time), seconds(load, 1, time.process_time)))
    best = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (save_time, load_time) in best.items():
        both = save_time + load_time
        times = f"{both / sum(best['torch']):.1f}"
        table.add_row(name, f"{save_time:.2f} s", f"{load_time:.2f} s", f"{both:.2f} s", times)
    return table


def bytes_of_encodings() -> Table:
    table = Table(title="Bytes of one file, LeNet shapes, synthetic normal weights, no biases")
    for column in ("network", "weights", "float32", "none", "huffman", "ans"):
        table.add_column(column, justify="left" if column in ("network", "weights") else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for network, shapes, left in (("LeNet-300-100", LENET300, 0.08), ("LeNet-5", LENET5, 0.08)):
            for name, clusters, share in (
                ("pruned to 8 %", 0, left),
                ("32 clusters", 32, 1.0),
                ("pruned to 8 %, 32 clusters", 32, left),
                ("pruned to 2 %, 16 clusters", 16, 0.02),
            ):
                generator = torch.Generator().manual_seed(0)
                state = {
                    f"{layer}.weight": clustered(shape, clusters, share, generator) for layer, shape in shapes.items()
                }
                found = [save_compressed(state, path, coder=coder) for coder in ("none", "huffman", "ans")]
                sizes = [found[0].dense_bytes, *(size.bytes for size in found)]
                table.add_row(network, name, *(f"{size:,}" for size in sizes))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=float, default=1e7)
    parser.add_argument("--weights", type=float, default=1e8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=["entropy_coding", "bytes_of_encodings", "many_tensors", "large"])
    arguments = parser.parse_args()
    tables: dict[str, Callable[[], Table]] = {
        "entropy_coding": lambda: entropy_coding(round(arguments.symbols), arguments.repeats),
        "bytes_of_encodings": bytes_of_encodings,
        "many_tensors": lambda: many_tensors(arguments.repeats),
        "large": lambda: large(round(arguments.weights), arguments.repeats),
    }
    console = Console()
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load before: {os.getloadavg()[0]:.1f}"
    )
    for name in tables if arguments.only is None else arguments.only:
        console.print(tables[name]())
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
