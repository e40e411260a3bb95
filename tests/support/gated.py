"""Small residual networks with gates whose decisions differ between samples."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.skipping.gates import SkipGates, new_gates
from lightning_compress.skipping.record import give_gates, take_gates
from lightning_compress.stages.block import Block
from support.small import FEATURES, SmallNet

KINDS = ("per_block", "recurrent", "policy")
MACS = 2 * 6 * 6 * 3 * FEATURES  # of each of the two blocks
ALL = 6 * 3 * FEATURES + 2 * MACS + 6 * FEATURES * 16 + 16 * 3  # of the network


def small_blocks(prefix: str = "") -> tuple[Block, ...]:
    return tuple(
        Block(
            name=f"{prefix}block{k}",
            kind="identity",
            reads=f"{prefix}block{k}",
            ends=f"{prefix}block{k}.norm",
            modules=(f"{prefix}block{k}.conv1", f"{prefix}block{k}.conv2", f"{prefix}block{k}.norm"),
            macs=MACS,
        )
        for k in (1, 2)
    )


def gated_net(kind: Any = "per_block", *, mixed: bool = True, seed: int = 0) -> tuple[SmallNet, SkipGates]:
    """A network with gates before both blocks; `mixed`: about half of the samples run each."""
    torch.manual_seed(seed)
    net = SmallNet(residual=True)
    for module in net.modules():  # statistics that evaluation has to do with
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.randn(6) / 4, torch.rand(6) + 0.5
    gates = new_gates(net, torch.zeros(2, FEATURES), small_blocks(), macs=ALL, kind=kind)
    give_gates(net, gates)
    if mixed:
        mix(net, gates)
    return net.eval(), gates


def mix(net: nn.Module, gates: SkipGates) -> None:
    """Give gates weights and biases with which about half of the samples run each block."""
    with torch.no_grad():
        for name, one in gates.named_parameters():
            if "logit" in name or name.endswith("recurrent.bias"):
                one.copy_(torch.randn_like(one) if name.endswith("weight") else torch.zeros_like(one))
        samples = torch.randn(64, FEATURES)
        for k in range(len(gates)):
            with gates.collecting() as found:
                net.eval()(samples)
            logits = found.logits()
            assert logits is not None
            shift = logits[:, k].median() / 10**0.5
            if gates.kind == "recurrent":
                gates.recurrent.bias[k] -= shift
            elif gates.kind == "policy":
                gates.policy.logit.bias[k] -= shift
            else:
                gates.get_submodule(str(k + 1)).logit.bias -= shift


def by_hand(net: SmallNet, x: Tensor, runs: Tensor) -> Tensor:
    """The network's outputs one sample at a time, in which a skipped block is left out of the program."""
    outputs, net = [], copy.deepcopy(net)
    take_gates(net)
    for sample, chosen in zip(x.split(1), runs.tolist(), strict=True):
        hidden = net.norm(net.conv(sample.unsqueeze(1))).relu()
        for block, taken in zip((net.block1, net.block2), chosen, strict=True):
            branch = block.norm(block.conv2(block.conv1(hidden).relu())) if taken else 0.0
            hidden = (hidden + branch).relu()
        outputs.append(net.head(net.hidden(hidden.flatten(1)).relu()))
    return torch.cat(outputs)
