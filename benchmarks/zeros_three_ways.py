"""The same zeros three ways: masked dense, CSR sparse, and thin. Zeros are not speed.

A share of the neurons, or filters, of every hidden layer is masked: whole rows of zeros. Masked dense multiplies by
them, CSR (torch.sparse_csr; a convolution unfolds its input first) stores and skips them, thin is what
`shrink` makes of the masked network, which loses the columns that read them as well. Beside it as many zeros, strewn
irregularly, as weight pruning leaves them: these have no thin network.

    python benchmarks/zeros_three_ways.py --amounts 0.5 0.8 0.95
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.channels.cut import shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.measure.footprint import compare_latency


class CSRLinear(nn.Module):
    """y = x W^T + b with W in compressed sparse rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.w_OI = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias

    def forward(self, x_NI: Tensor) -> Tensor:
        return (self.w_OI @ x_NI.T).T + self.bias


class CSRConv(nn.Module):
    """A convolution as one product of the filters, in compressed sparse rows, with the unfolded input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        assert layer.groups == 1
        self.w_OK = layer.weight.detach().flatten(1).to_sparse_csr()
        self.bias = layer.bias
        self.window = {"kernel_size": layer.kernel_size, "padding": layer.padding, "stride": layer.stride}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        n, _, height, width = x_NCHW.shape  # stride 1, "same" padding
        columns = F.unfold(x_NCHW, **self.window)
        out = self.w_OK @ columns.transpose(0, 1).flatten(1)
        return out.view(-1, n, height, width).transpose(0, 1) + self.bias.view(-1, 1, 1)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1024), nn.ReLU()),
        nn.Linear(1024, 10),
    )


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[int], Tensor], tuple[int, ...]]] = {
    "MLP": (mlp, lambda batch: torch.randn(batch, 1024), (1, 64)),
    "conv net, 32 px": (conv_net, lambda batch: torch.randn(batch, 3, 32, 32), (1, 8)),
}


@torch.no_grad()
def rows_masked(dense: nn.Sequential, x: Tensor, amount: float) -> nn.Sequential:
    """The same share of zeros in every hidden layer, as whole rows with their biases."""
    masked = copy.deepcopy(dense)
    tensors = dict(masked.named_parameters())
    for group in channel_groups(masked, x).free():
        drop = torch.randperm(group.size)[: round(amount * group.size)]
        for member in (one for one in group.members if one.produces):
            tensors[member.tensor].index_fill_(member.dim, member.index[drop].flatten(), 0.0)
    return masked


@torch.no_grad()
def strewn(dense: nn.Sequential, amount: float) -> nn.Sequential:
    """The same share of zeros in every hidden layer, anywhere."""
    masked = copy.deepcopy(dense)
    weights = [parameter for parameter in masked.parameters() if parameter.dim() > 1]
    for weight in weights[:-1]:
        drop = torch.randperm(weight.numel())[: round(amount * weight.numel())]
        weight.view(-1)[drop] = 0.0
    return masked


def to_csr(masked: nn.Sequential) -> nn.Sequential:
    def sparse(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear) and layer.out_features > 10:
            return CSRLinear(layer)
        return CSRConv(layer) if isinstance(layer, nn.Conv2d) else layer

    return nn.Sequential(*map(sparse, masked))


def share_of_zeros(model: nn.Module) -> float:
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return 1 - sum(int(one.count_nonzero()) for one in weights) / sum(one.numel() for one in weights)


def variants(make: Callable[[], nn.Sequential], x: Tensor, amounts: list[float]) -> dict[tuple[str, float], nn.Module]:
    torch.manual_seed(0)
    dense = make().eval()
    found: dict[tuple[str, float], nn.Module] = {("dense", 0.0): dense}
    for amount in amounts:
        regular, irregular = rows_masked(dense, x, amount), strewn(dense, amount)
        found["rows, masked dense", amount] = regular
        found["rows, CSR", amount] = to_csr(regular)
        found["rows, thin", amount] = shrink(copy.deepcopy(regular), x)
        found["irregular, masked dense", amount] = irregular
        found["irregular, CSR", amount] = to_csr(irregular)
        with torch.no_grad():
            for like, names in ((regular, ("rows, CSR", "rows, thin")), (irregular, ("irregular, CSR",))):
                for name in names:
                    torch.testing.assert_close(found[name, amount](x), like(x), rtol=1e-3, atol=1e-4)
    return found


def compare(name: str, amounts: list[float], rounds: int, repeats: int) -> Table:
    make, inputs, batches = NETWORKS[name]
    networks = variants(make, inputs(2), amounts)
    table = Table(title=f"{name}: milliseconds of a forward pass (dense / this)")
    table.add_column("zeros")
    for batch in batches:
        for amount in amounts:
            table.add_column(f"{amount:.0%}, batch {batch}", justify="right")
    seconds: dict[int, list[dict[str, float]]] = {}
    for batch in batches:
        x = inputs(batch)
        timed = {f"{kind} {amount}": (model, x) for (kind, amount), model in networks.items()}
        seconds[batch] = [compare_latency(timed, repeats=repeats) for _ in range(rounds)]

    def cell(kind: str, amount: float, batch: int) -> str:
        own = [one[f"{kind} {amount}"] for one in seconds[batch]]
        gains = [one["dense 0.0"] / mine for one, mine in zip(seconds[batch], own, strict=True)]
        return f"{statistics.median(own) * 1e3:.2f} ({statistics.median(gains):.2f}x)"

    for kind in dict.fromkeys(kind for kind, _ in networks):
        row = [cell(kind, 0.0 if kind == "dense" else amount, batch) for batch in batches for amount in amounts]
        table.add_row(kind, *row)
    shares = [f"{share_of_zeros(networks['rows, masked dense', amount]):.1%}" for amount in amounts]
    table.caption = f"Zeros among all weights, rows: {', '.join(shares)}."
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="one is disturbed least")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # that sparse CSR is in beta
    console = Console(width=140)
    console.print(f"torch {torch.__version__}, {arguments.threads} threads, load before: {os.getloadavg()[0]:.1f}")
    for name in arguments.networks:
        console.print(compare(name, arguments.amounts, arguments.rounds, arguments.repeats))
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
