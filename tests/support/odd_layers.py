"""A network with layers whose channels do not go to other layers alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """Has a layer of each kind that gets no gates by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(1, 4, 3, padding=1)
        self.late_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.offset = nn.Conv2d(4, 4, 1)
        self.branch = nn.Conv2d(4, 4, 1)
        self.by_pixel = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late_norm(F.relu(self.late(x)))
        x = self.twice(F.relu(self.twice(x)))
        x = F.relu(self.depthwise(x))
        x = self.offset(x).sigmoid() + self.branch(x)
        samples = x.shape[0]
        pixels = F.relu(self.by_pixel(x.permute(0, 2, 3, 1).reshape(-1, 4)))
        return self.head(pixels.view(samples, -1, 4).mean(1))
