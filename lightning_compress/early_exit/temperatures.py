"""A temperature per exit, so that what a head calls likely is as often right: softmax(z / T).

With b = 1 / T, the mean negative log-likelihood of the targets y,

    f(b) = mean of log sum_c exp(b z_c) - b z_y
    f'(b) = mean of E_p[z] - z_y            f''(b) = mean of Var_p[z] >= 0

is convex. Newton's steps on f' find its minimum; a step out of the interval that holds it is replaced by bisection.
Guo et al. 2017 (1706.04599).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from lightning_compress.core.precision import widened

_FLATTEST, _SHARPEST = 0.1, 100.0  # b times the spread of the logits; float32 still orders samples at the first
_SAMPLES = 4096  # as many find where to start, for more


def fit_temperature(logits: Tensor, targets: Tensor, *, name: str = "logits") -> float:
    """Return the temperature T > 0 at which softmax(logits / T) gives the targets the highest likelihood.

    No temperature is best where every sample is right (T -> 0): then the targets are taken to be wrong once in N + 2
    times, which is what N right answers allow to expect of the next one. Nor where targets have logits below the mean
    of the classes (T -> infinity): then it is 10 times the spread of the logits. A warning says so.

    Args:
        logits: z of shape (N, C). Samples with logits that are not finite numbers, or with a forbidden target, of
            logit -inf, do not count.
        targets: y, classes (N,).
        name: Of the logits, for messages.

    Raises:
        ValueError: No sample counts.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]]).expand(4, 2)  # class 0 gets 88 %, and is right three times of four
        >>> temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> round(temperature, 4), (logits[0] / temperature).softmax(0)
        (1.8205, tensor([0.7500, 0.2500]))
    """
    temperature, note = fit(logits, targets, name=name)
    if note:
        warnings.warn(note, stacklevel=2)
    return temperature


def fit_temperatures(logits: Sequence[Tensor], targets: Tensor) -> tuple[float, ...]:
    """Return a temperature for each exit and for the full network: see `fit_temperature`."""
    return tuple(fit_temperature(z, targets, name=name) for name, z in named(logits))


def named(logits: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Return the logits of the exits and of the full network, each with the name that messages give it."""
    return [(f"exit {k + 1}" if k < len(logits) - 1 else "the full network", z) for k, z in enumerate(logits)]


def fit(logits: Tensor, targets: Tensor, *, name: str) -> tuple[float, str | None]:
    """Return the temperature as `fit_temperature` does, and what is to be said of it."""
    z = widened(logits.detach())
    z = z - z.gather(1, targets[:, None].to(z.device))  # the target's logit is 0
    z = z[z.logsumexp(1).isfinite()]
    if not len(z):
        raise ValueError(f"{name}: none of {len(logits)} samples has finite logits, so no temperature can be fitted")
    zeros = z.masked_fill(z == -math.inf, 0)  # forbidden classes have probability 0
    spread = float((zeros - zeros.mean(1, keepdim=True)).square().mean().sqrt())
    if not spread:
        return 1.0, f"{name}: the logits of a sample are all equal, so that no temperature changes anything; it stays 1"
    low, high = _FLATTEST / spread, _SHARPEST / spread
    right = bool((z <= 0).all())
    wrong = 1 / (len(z) + 2) if right else 0.0
    b = math.sqrt(low * high)
    for part in [zeros[:_SAMPLES], zeros] if len(z) > _SAMPLES else [zeros]:
        b = _newton(part, z[: len(part)], b, low, high, wrong * float(zeros.mean()))
    if right:
        return 1 / b, (
            f"{name}: all {len(z)} samples that fit its temperature are right, so that none is the best; {1 / b:.3g} "
            "is as sure as that many right answers allow. More samples would find a better one"
        )
    if b > low * 1.001:
        return 1 / b, None
    return 1 / b, (
        f"{name}: the logits of the targets are no higher than those of other classes, so that no temperature is the "
        f"best; it is bounded at {1 / b:.3g}. Check that the head is trained, and that its classes are the targets'"
    )


def _newton(zeros: Tensor, z: Tensor, b: float, low: float, high: float, level: float) -> float:
    """Return where f' reaches a level within an interval; z has -inf where `zeros` has 0 for a forbidden class."""
    for _ in range(100):
        weighted = (b * z).softmax(1).mul_(zeros)
        mean = weighted.sum(1).double()
        slope, curvature = float(mean.mean()) - level, float((weighted.mul_(zeros).sum(1) - mean.square()).mean())
        low, high = (low, b) if slope > 0 else (b, high)
        step = b - slope / curvature if curvature > 0 else math.inf
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - b) <= 1e-5 * b:  # the error of a step of Newton's is about its square
            return after
        b = after
    return b
