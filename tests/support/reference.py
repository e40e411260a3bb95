"""What a cut network must answer, found without looking at what consumes a channel.

Two oracles run the original forward of the dense network:

- ``zeroed`` zeroes whatever produces the dropped channels (weights, biases, norm scales and shifts). Norms that average
  over channels leave out those whose scale is exactly zero. This is what a group that calls itself exact promises.
- ``absent`` puts NaN where ``zeroed`` puts zeros, and NaN means "not there": contractions skip it, averages are over
  the others, everything else hands it on. This is what a cut means for any group, also where f(0) is not 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten


class MemberLike(Protocol):
    """The part of a member that the oracles read."""

    @property
    def tensor(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def produces(self) -> bool: ...


class GroupLike(Protocol):
    """The part of a channel group that the oracles read."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def members(self) -> Iterable[Any]: ...


def zeroed(
    model: nn.Module, groups: Iterable[GroupLike], keep: Mapping[str, Tensor], inputs: Any, *, norms: bool = True
) -> Any:
    """The dense network with zeros for what produces the dropped units; ``norms=False``: its forward is not touched."""
    dense = filled(model, groups, keep, 0.0)
    if norms:
        for module in dense.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _RMSNormOfKept(module)
    return run(dense, inputs, _NormsOfKept() if norms else _Double())


def absent(model: nn.Module, groups: Iterable[GroupLike], keep: Mapping[str, Tensor], inputs: Any) -> Any:
    """The dense network in which the dropped units are not there."""
    return run(filled(model, groups, keep, math.nan), inputs, _Absent())


def filled(model: nn.Module, groups: Iterable[GroupLike], keep: Mapping[str, Tensor], value: float) -> nn.Module:
    """A copy in which all that produces a dropped unit has one value."""
    dense = copy.deepcopy(model)
    tensors = dict(dense.named_parameters(remove_duplicate=False)) | dict(dense.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for group in groups:
            if group.name not in keep:
                continue
            dropped = torch.ones(group.size, dtype=torch.bool)
            dropped[keep[group.name]] = False
            for member in group.members:
                if member.produces:
                    tensors[member.tensor].index_fill_(member.dim, member.index[dropped].flatten(), value)
    return dense


def run(model: nn.Module, inputs: Any, mode: TorchDispatchMode | None = None) -> Any:
    """The output in double precision, whatever the network casts to on its way."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _no_fast_path(), mode or _Double():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def to_double(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def relative_difference(a: Any, b: Any) -> float:
    """The largest difference of nested outputs over the largest entry of the second, the reference."""
    ours, theirs = (
        [leaf for leaf in tree_flatten(_plain(tree))[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tree in (a, b)
    )
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert ours
    largest = max(float(y.abs().max()) for y in theirs)
    differences = [float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True)]
    worst = math.nan if any(math.isnan(d) for d in differences) else max(differences)
    return worst / largest if largest else worst


def _plain(tree: Any) -> Any:
    """Containers of the transformers package as the dicts that they are."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return type(tree)(map(_plain, tree)) if type(tree) in (list, tuple) else tree


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Random values for everything, scaled so that no branch is negligible; also for statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * deviation)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if "Norm" in type(module).__name__ and name == "weight":
                    uniform(parameter, 0.5, 1.5)
                elif isinstance(module, nn.PReLU):
                    uniform(parameter, 0.1, 0.4)
                elif name.endswith("bias"):
                    normal(parameter, 0.1)
                elif isinstance(module, nn.Embedding) or parameter.dim() < 2 or "weight" not in name:
                    normal(parameter, 0.5)
                else:
                    normal(parameter, _fan_in(module, parameter) ** -0.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    normal(buffer, 0.3)
                elif name == "running_var":
                    uniform(buffer, 0.5, 1.5)
    return model


def _fan_in(module: nn.Module, weight: Tensor) -> float:
    if type(module).__name__ == "Conv1D":  # of the transformers package: a linear layer, transposed
        return weight.shape[0]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        overlap = math.prod(module.kernel_size) / math.prod(module.stride)
        return weight.shape[0] / module.groups * overlap
    return weight[0].numel()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch's attention modules have fused kernels that hide their operators."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Double(TorchDispatchMode):
    """Networks of the transformers package cast to float32 inside; what is double stays double here."""

    rules: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and args[0].dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
            return args[0].clone()
        rule = self.rules.get(func.overloadpacket)
        return rule(func, *args, **kwargs) if rule else func(*args, **kwargs)


def _layer_norm(rule: Callable[..., Tensor]) -> Callable[..., Any]:
    def native(func: Any, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        dims = tuple(range(-len(shape), 0))
        return rule(x, dims, weight, bias, eps), x.new_empty(0), x.new_empty(0)

    return native


def _group_norm(rule: Callable[..., Tensor]) -> Callable[..., Any]:
    def native(func: Any, x: Tensor, weight: Any, bias: Any, n: int, c: int, hxw: int, groups: int, eps: float) -> Any:
        w, b = (None if t is None else t.view(1, groups, c // groups, 1) for t in (weight, bias))
        out = rule(x.reshape(n, groups, c // groups, hxw), (-2, -1), w, b, eps)
        return out.reshape(x.shape), x.new_empty(0), x.new_empty(0)

    return native


def _norm_of_kept(x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    kept = (torch.ones_like(x) if weight is None else (weight != 0).expand_as(x)).to(x.dtype)
    count = kept.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * kept).sum(dims, keepdim=True) / count
    var = ((x - mean).square() * kept).sum(dims, keepdim=True) / count
    out = (x - mean) * torch.rsqrt(var + eps) * kept
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


class _NormsOfKept(_Double):
    """Layer and group norms average over the channels whose scale is not exactly zero."""

    rules: ClassVar = {
        aten.native_layer_norm: _layer_norm(_norm_of_kept),
        aten.native_group_norm: _group_norm(_norm_of_kept),
    }


class _RMSNormOfKept:
    """The forward of an RMS norm, torch's or written by hand, over the channels whose scale is not exactly zero."""

    def __init__(self, module: Any) -> None:
        self.weight = module.weight
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        self.eps = eps or torch.finfo(self.weight.dtype).eps

    def __call__(self, x: Tensor) -> Tensor:
        kept = self.weight != 0
        return self.weight * (x * torch.rsqrt(x[..., kept].square().mean(-1, keepdim=True) + self.eps))


def _norm_of_present(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    mean = x.nanmean(dims, keepdim=True)
    out = (x - mean) * torch.rsqrt((x - mean).square().nanmean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _product(func: Any, *args: Tensor, **kwargs: Any) -> Tensor:
    """mm, bmm, addmm, baddbmm: absent terms are skipped; a row or column of nothing but absent terms is absent."""
    *bias, a, b = args
    out = torch.matmul(a.nan_to_num(), b.nan_to_num())
    out = out.masked_fill(a.isnan().all(-1, keepdim=True) | b.isnan().all(-2, keepdim=True), math.nan)
    return kwargs.get("beta", 1) * bias[0] + kwargs.get("alpha", 1) * out if bias else out


def _convolution(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Absent terms are skipped, also those of a weight; a channel whose weights are all absent is absent."""
    out = func(x.nan_to_num(), weight.nan_to_num(), bias, *rest)
    transposed, groups = rest[3], rest[5]
    nothing = weight.isnan().flatten(2).all(-1)
    nothing = nothing.unflatten(0, (groups, -1)).all(1).flatten() if transposed else nothing.all(1)
    return out.masked_fill(nothing.view(1, -1, *[1] * (x.dim() - 2)), math.nan)


def _mean(func: Any, x: Tensor, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return x.nanmean(tuple(dims) if dims else tuple(range(x.dim())), keepdim)


def _length(func: Any, x: Tensor, order: float = 2, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = func(x.nan_to_num(nan=0.0), order, *args, **kwargs)
    return result


def _sum(func: Any, x: Tensor, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    if not x.is_floating_point():
        return func(x, *([dims, keepdim] if dims else []), **kwargs)
    dims = tuple(dims) if dims else tuple(range(x.dim()))
    nothing = x.isnan().to(torch.uint8).amin(dims, keepdim).bool()
    return x.nansum(dims, keepdim).masked_fill(nothing, math.nan)


def _variance(func: Any, x: Tensor, dims: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    dims = tuple(dims) if dims else tuple(range(x.dim()))
    count = (~x.isnan()).sum(dims, keepdim)
    square = (x - x.nanmean(dims, True)).square().nanmean(dims, keepdim)
    return square * count / (count - (1 if correction is None else correction))


def _amax(func: Any, x: Tensor, dims: Any = (), keepdim: bool = False) -> Tensor:
    largest = func(x.masked_fill(x.isnan(), -math.inf), dims, keepdim)
    return largest.masked_fill(largest == -math.inf, math.nan)


def _softmax(func: Any, x: Tensor, dim: int, *rest: Any) -> Tensor:
    return func(x.masked_fill(x.isnan(), -math.inf), dim, *rest).masked_fill(x.isnan(), math.nan)


class _Absent(_Double):
    """NaN means "not there"."""

    rules: ClassVar = {
        aten.native_layer_norm: _layer_norm(_norm_of_present),
        aten.native_group_norm: _group_norm(_norm_of_present),
        aten.convolution: _convolution,
        **dict.fromkeys([aten.mm, aten.bmm, aten.addmm, aten.baddbmm], _product),
        **dict.fromkeys([aten._softmax, aten._safe_softmax, aten._log_softmax], _softmax),
        aten.mean: _mean,
        aten.sum: _sum,
        aten.linalg_vector_norm: _length,
        aten.var: _variance,
        aten.amax: _amax,
    }
