"""The answers of a batch whose samples leave a network at different exits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.early_exit.rules import Confidence, ExitRule, leaves


class Answers:
    """The answers of a batch, of which a part is still in the network."""

    def __init__(self, rule: ExitRule, heads: nn.ModuleList, confidence: Confidence | None) -> None:
        self.rule, self.heads, self.confidence = rule, heads, confidence
        self.reset()

    def reset(self) -> None:
        """Begin anew: no sample has an answer."""
        self.output: Tensor | None = None
        self.index: Tensor | None = None
        self.inside: Tensor | None = None  # the positions of those in the network; None: all
        self.before: Tensor | None = None

    def visit(self, cut: int, feature: Tensor) -> Tensor | None:
        """Answer for all that are at an exit, and return the positions among them of those that stay, or None."""
        answer = self.heads[cut - 1](feature)
        self.put(answer, cut - 1)
        leave, after = leaves(self.rule, cut - 1, answer, before=self.before, confidence=self.confidence)
        stay = (~leave).nonzero().squeeze(1)  # the host waits for the device here, and nowhere else
        self.before = after
        if stay.shape[0] == leave.shape[0]:
            return None
        self.inside = stay if self.inside is None else self.inside[stay]
        self.before = None if after is None else after[stay]
        return stay

    def put(self, answer: Tensor, k: int) -> None:
        """Write the answers of those in the network; those of a later exit replace them."""
        if self.output is None or self.index is None:
            self.output = answer.clone()  # a head may return what the next stage writes into
            self.index = torch.full(answer.shape[:1], k, dtype=torch.long, device=answer.device)
        elif self.inside is None:
            self.output = answer.to(self.output.dtype, copy=True)
            self.index = torch.full_like(self.index, k)
        else:
            self.output = self.output.index_copy(0, self.inside, answer.to(self.output.dtype))
            self.index = self.index.index_fill(0, self.inside, k)


class WholeBatchAnswers(Answers):
    """The answers of a batch that leaves as a whole."""

    def visit(self, cut: int, feature: Tensor) -> Tensor | None:
        answer = self.heads[cut - 1](feature)
        self.put(answer, cut - 1)
        leave, self.before = leaves(self.rule, cut - 1, answer, before=self.before, confidence=self.confidence)
        self.inside = ~leave if self.inside is None else self.inside & ~leave
        return None if bool(self.inside.any()) else self.inside[:0]

    def put(self, answer: Tensor, k: int) -> None:
        if self.output is None or self.index is None or self.inside is None:
            self.inside, inside = None, self.inside
            super().put(answer, k)
            self.inside = inside
            return
        mask = self.inside.reshape(-1, *[1] * (answer.dim() - 1))
        self.output = torch.where(mask, answer.to(self.output.dtype), self.output)
        self.index = self.index.masked_fill(self.inside, k)
