"""Small residual networks and their blocks, named by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.stages.block import Block

IMAGES = (3, 3, 16, 16)


def resnet(seed: int = 0, width: int = 4) -> ResNet20:
    """A ResNet whose norms have seen data: no two channels and no two blocks are alike."""
    torch.manual_seed(seed)
    net = ResNet20(width=width)
    for one in net.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.normal_(std=0.3)
            one.running_var.uniform_(0.5, 2.0)
            one.weight.data.uniform_(0.5, 1.5)
            one.bias.data.normal_(std=0.3)
    return net.eval()


def resnet_block(stage: int, place: int, macs: int = 100) -> Block:
    name = f"stages.{stage}.{place}"
    parts = tuple(f"{name}.{part}" for part in ("conv1", "bn1", "relu1", "conv2", "bn2"))
    kind = "projection" if stage > 0 and place == 0 else "identity"
    return Block(name, kind, f"{name}.conv1", f"{name}.bn2", parts, macs)  # type: ignore[arg-type]


def images(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed))


class Token(nn.Module):
    """A pre-norm layer of a transformer whose functional code stands between its modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return x + self.scale * F.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))), 0.2, self.training)


class Transformer(nn.Module):
    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Token(width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def transformer(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer().eval()


def attention(layer: int) -> Block:
    start = f"layers.{layer}."
    parts = (f"{start}norm1", f"{start}qkv", f"{start}out")
    return Block(f"{start}attention", "identity", f"{start}norm1", f"{start}out", parts, 200)


def feed_forward(layer: int) -> Block:
    start = f"layers.{layer}."
    parts = (f"{start}norm2", f"{start}fc1", f"{start}fc2")
    return Block(f"{start}mlp", "identity", f"{start}norm2", f"{start}fc2", parts, 300)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(seed))
