"""Signs of weights and of inputs, and their straight-through gradients.

    deterministic   b = sign(w), sign(0) = +1                        BinaryConnect, Courbariaux et al. 2015
    stochastic      b = +1 with probability hard_sigmoid(w), else -1
    scaling="mean"  W~ = alpha_c b,  alpha_c = mean over channel c of |w|      XNOR-Net, Rastegari et al. 2016

Pruned entries are 0 in b, and alpha_c is then the mean over the other entries: the weights are ternary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_compress.core.by_channel import by_channel
from lightning_compress.core.given import real_number
from lightning_compress.core.precision import widened

Mode = Literal["deterministic", "stochastic"]
Scaling = Literal["none", "mean"]
LRScale = Literal["none", "glorot"]


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, in the type of x.

    Example:
        >>> sign(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """
    return sign_(x.clone())


def sign_(x: Tensor) -> Tensor:
    """Compute `sign` in place."""
    return x.ge_(0).mul_(2).sub_(1)


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return clip((x + 1) / 2, 0, 1), the probability of +1 in stochastic binarization.

    Example:
        >>> hard_sigmoid(torch.tensor([-2.0, 0.0, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    return (x + 1).div_(2).clamp_(0, 1)


def draw_positive(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a sample of stochastic binarization; return a boolean tensor that is True where the weight is +1.

    Args:
        w: The real weights.
        generator: A CPU generator, or None for torch's own. For weights on another device, a generator is made there,
            with a seed that this one draws.
    """
    if generator is not None and w.device != generator.device:
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        generator = torch.Generator(w.device).manual_seed(seed)
    uniform = torch.rand(w.shape, dtype=torch.float32, device=w.device, generator=generator)
    return uniform < hard_sigmoid(w)


def channel_scales(w: Tensor, *, groups: int | None = None, alive: Tensor | None = None) -> Tensor:
    """Return alpha_c = mean |w| over each output channel, shaped to multiply `by_channel` of the weight.

    alpha_c minimises norm(w_c - alpha_c sign(w_c)). It is computed in float32, or in float64 for float64 weights:
    16-bit sums and counts would overflow, or lose small numbers.

    Args:
        w: The real weights.
        groups: The groups of a transposed convolution, as for `by_channel`; None for other layers.
        alive: False where a weight is pruned; pruned weights do not count in the mean. None: no weight is pruned.

    Example:
        >>> channel_scales(torch.tensor([[0.5, -1.5], [0.0, 0.1]])).flatten()
        tensor([1.0000, 0.0500])
    """
    magnitudes = by_channel(widened(w).abs().contiguous(), groups)
    if alive is None:
        return magnitudes.mean((1, 3), keepdim=True)
    alive = by_channel(alive.contiguous(), groups)
    counts = alive.sum((1, 3), keepdim=True, dtype=magnitudes.dtype)
    return magnitudes.masked_fill_(~alive, 0.0).sum((1, 3), keepdim=True) / counts.clamp_(min=1)


@torch.no_grad()
def binarize(
    w: Tensor,
    *,
    scaling: Scaling = "none",
    positive: Tensor | None = None,
    groups: int | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Return the binary weights W~ of real weights.

    Args:
        w: The real weights.
        scaling: "none" for -1 and +1, "mean" for -alpha_c and +alpha_c.
        positive: A sample from `draw_positive`; by default the signs of w.
        groups: The groups of a transposed convolution, as for `by_channel`; None for other layers.
        alive: False where a weight is pruned, so that W~ is 0 there. None: no weight is pruned.

    Example:
        >>> w = torch.tensor([[0.5, -1.5], [0.0, 0.1]])
        >>> binarize(w)
        tensor([[ 1., -1.],
                [ 1.,  1.]])
        >>> binarize(w, scaling="mean")
        tensor([[ 1.0000, -1.0000],
                [ 0.0500,  0.0500]])
    """
    signs = sign(w) if positive is None else positive.to(w.dtype).mul_(2).sub_(1)
    if scaling == "mean":
        signs = signs.contiguous()
        by_channel(signs, groups).mul_(channel_scales(w, groups=groups, alive=alive))
    return signs if alive is None else signs.masked_fill_(~alive, 0.0)


@torch.no_grad()
def real_gradient(
    gradient: Tensor,
    w: Tensor,
    *,
    scaling: Scaling = "none",
    groups: int | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Return dL/dw from G = dL/dW~.

    Without scaling the gradient passes straight through: dL/dw = G. With scaling, W~_i = alpha sign(w_i), where alpha
    is the mean of |w| over the n weights of a channel. Then d|w|/dw = sign(w), and the straight-through estimator takes
    d sign(w)/dw as 1 for |w| <= 1 and as 0 elsewhere:

        dL/dw_i = sign(w_i) / n * sum over j of G_j sign(w_j)  +  alpha * G_i * [|w_i| <= 1]

    Pruned weights get the gradient 0.

    Args:
        gradient: The gradient G with respect to the binary weights.
        w: The real weights.
        scaling: "none" or "mean", as for `binarize`.
        groups: The groups of a transposed convolution, as for `by_channel`; None for other layers.
        alive: False where a weight is pruned. None: no weight is pruned.

    Example:
        >>> w, G = torch.tensor([[0.5, -1.5]]), torch.tensor([[1.0, 3.0]])
        >>> real_gradient(G, w, scaling="mean")  # 1 / 2 * (1 - 3) + 1 * 1, and -1 / 2 * (1 - 3) + 1 * 3 * 0
        tensor([[0., 1.]])
    """
    if scaling == "none":
        return gradient if alive is None else gradient.masked_fill(~alive, 0.0)
    gradient, given = widened(gradient), gradient.dtype
    signs = sign(widened(w)).contiguous()
    alpha = channel_scales(w, groups=groups, alive=alive)
    count = torch.tensor(w.numel() // max(alpha.numel(), 1), device=w.device)
    products = (gradient * signs).contiguous()
    if alive is not None:  # a product with the mask would be NaN where a pruned entry's gradient is infinite
        count = by_channel(alive.contiguous(), groups).sum((1, 3), keepdim=True)
        products.masked_fill_(~alive, 0.0)
    shared = by_channel(products, groups).sum((1, 3), keepdim=True)
    del products  # saves memory: it is as large as the weights
    shared /= count.clamp(min=1)
    own = torch.where((w >= -1) & (w <= 1), gradient, 0.0).contiguous()
    by_channel(own, groups).mul_(alpha)
    by_channel(signs, groups).mul_(shared)
    result = signs.add_(own).view(w.shape).to(given)
    return result if alive is None else result.masked_fill_(~alive, 0.0)


def glorot_coefficient(shape: Sequence[int]) -> float:
    """Return BinaryConnect's learning-rate coefficient sqrt(1.5 / (fan_in + fan_out)) of a layer; 1 for a vector.

    Updates of the real weights are divided by this coefficient.

    Args:
        shape: The shape of the weight.

    Example:
        >>> round(glorot_coefficient((1024, 784)), 4), round(glorot_coefficient((64, 32, 3, 3)), 4)
        (0.0288, 0.0417)
    """
    if len(shape) < 2:
        return 1.0
    return math.sqrt(1.5 / ((shape[0] + shape[1]) * math.prod(shape[2:])))


class _Sign(torch.autograd.Function):
    """Computes sign(x); the gradient is 1 for |x| <= 1 and 0 elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, gradient, 0.0)


def sign_through(x: Tensor) -> Tensor:
    """Return sign(x); the straight-through estimator takes its gradient as 1 for |x| <= 1 and as 0 elsewhere.

    References:
        Courbariaux et al. 2016, "Binarized Neural Networks", section 1.3, equation 4.

    Example:
        >>> x = torch.tensor([-2.0, -0.5, 0.0, 1.5], requires_grad=True)
        >>> sign_through(x).sum().backward(); x.grad
        tensor([0., 1., 1., 0.])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _Sign.forward(x)
    signs: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    return signs


def checked_clip(clip: Any) -> float | None:
    """Return the limit of latent weights, None for none, or raise a ValueError."""
    return None if clip is None else real_number(clip, "clip must be a number above 0, or None", above=0)


def check_binary(mode: str, scaling: str, lr_scale: str) -> None:
    """Raise a ValueError unless the arguments and their combination are valid."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'deterministic' or 'stochastic'; got {mode!r}.")
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling must be 'none' or 'mean' (of |w|, per output channel); got {scaling!r}.")
    if lr_scale not in get_args(LRScale):
        raise ValueError(f"lr_scale must be 'none' or 'glorot'; got {lr_scale!r}.")
    if mode == "stochastic" and scaling == "mean":
        raise ValueError(
            "scaling='mean' does not go with mode='stochastic', where |w| already sets the probability of a sign: use "
            "mode='deterministic' or scaling='none'."
        )


def holds_signs(parameters: Mapping[str, Tensor], groups: Mapping[str, int]) -> bool:
    """Return whether every weight is one of -a, 0 and a, with one number a for each output channel.

    Args:
        parameters: The weights, by name.
        groups: The groups of transposed convolutions, by parameter name.

    Example:
        >>> holds_signs({"weight": torch.tensor([[1.0, -1.0], [0.0, 2.0]])}, {})
        True
        >>> holds_signs({"weight": torch.tensor([[1.0, -2.0], [0.0, 2.0]])}, {})
        False
    """
    for name, parameter in parameters.items():
        magnitudes = by_channel(parameter.detach().abs().contiguous(), groups.get(name))
        largest = magnitudes.amax((1, 3), keepdim=True)
        if not bool(((magnitudes == 0) | (magnitudes == largest)).all()):
            return False
    return True
