"""Folds batch norms into the layers before them: in evaluation mode a batch norm is a factor and a shift per channel.

y = (w x + b - mean) f + beta,  f = gamma / sqrt(var + eps)        w' = f w,  b' = (b - mean) f + beta
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.graph.walk import CONTRACTIONS, export, module_of, operator_of
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import WEIGHT_LAYERS

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def fold_batch_norm(
    model: nn.Module, example_inputs: ExampleInputs, *, scales: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Fold each batch norm into the linear layer or convolution before it, in place; evaluation results stay the same.

    For each output channel w' = f w and b' = (b - mean) f + beta, with f = gamma / sqrt(var + eps). An `nn.Identity`
    replaces the norm. A pair is folded if the exported graph of evaluation mode proves it safe: only the norm reads the
    layer's output, both are called once and share no tensor, the norm keeps running statistics, and no hook reads the
    value between them.

    Args:
        model: The network; a layer without bias gets one.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; batch first.
        scales: For layers whose weights are integers times a scale, q s: the scales s by the layer's name, one per
            output channel. Then w' = q (f s) bit for bit, so the weights are again integers times a scale.

    Returns:
        The model.

    Raises:
        ValueError: The model cannot be exported.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> net[1].running_mean.fill_(0.5), net[1].running_var.fill_(4.0)
        (tensor([0.5000, 0.5000]), tensor([4., 4.]))
        >>> x = torch.rand(2, 1, 5, 5)
        >>> before = net(x)
        >>> torch.allclose(fold_batch_norm(net, x)(x), before, atol=1e-6)
        True
        >>> net[1], net[0].bias.shape
        (Identity(), torch.Size([2]))
    """
    for layer_name, norm_name in list(_pairs(model, example_inputs)):
        norm = model.get_submodule(norm_name)
        _fold(model.get_submodule(layer_name), norm, (scales or {}).get(layer_name))
        parent, _, name = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity().train(norm.training))
    return model


def _pairs(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[tuple[str, str]]:
    """Yield the names of each layer and the norm that can be folded into it."""
    with evaluating(model):
        program = export(model, example_inputs)
    tensor_of = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    uses = _uses(model)

    def owns(name: str, nodes: Mapping[str, Any]) -> bool:
        """Return whether the nodes are the module's own tensors and nothing else reads these."""
        module = model.get_submodule(name)
        return uses[id(module)] == 1 and all(
            getattr(module, key) is None
            if node is None
            else tensor_of.get(node.name) == f"{name}.{key}" and len(node.users) == uses[id(getattr(module, key))] == 1
            for key, node in nodes.items()
        )

    for node in program.graph.nodes:
        if operator_of(node) != "batch_norm" or operator_of(node.args[0]) not in CONTRACTIONS:
            continue
        feed, gamma, beta, mean, var, by_batch = node.args[:6]
        weight, bias = feed.args[1], feed.args[2] if len(feed.args) > 2 else None
        if by_batch or len(feed.users) > 1 or (operator_of(feed) == "linear" and feed.meta["val"].dim() != 2):
            continue  # for sequences, the channels of the norm are dim 1, and those of the linear layer the last dim
        layer_name, norm_name = module_of(feed), module_of(node)
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if not isinstance(layer, WEIGHT_LAYERS) or type(norm) not in _NORMS:
            continue
        if layer._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks:
            continue
        state = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
        if owns(layer_name, {"weight": weight, "bias": bias}) and owns(norm_name, state):
            yield layer_name, norm_name


def _fold(layer: Any, norm: Any, scale: Tensor | None) -> None:
    weight: nn.Parameter = layer.weight
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    if scale is None:
        weight.copy_(weight.double() * _along(layer, factor))
    else:
        integers = torch.round(weight / _along(layer, scale)).nan_to_num_(
            0, 0, 0
        )  # the scale of a channel of zeros may be zero
        weight.copy_(integers * _along(layer, (scale.double() * factor).to(weight.dtype)))
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    shift = (shift * factor + (0.0 if norm.bias is None else norm.bias.double())).to(weight.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)
    else:
        layer.bias.copy_(shift)


def _along(layer: Any, vector: Tensor) -> Tensor:
    """Return a vector with one number per output channel, shaped to multiply the layer's weight."""
    tail = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _TRANSPOSED):
        return vector.view(-1, 1, *tail)
    in_channels = layer.weight.shape[0] // layer.groups  # per group
    return vector.view(layer.groups, -1).repeat_interleave(in_channels, 0).view(layer.weight.shape[0], -1, *tail)


def _uses(model: nn.Module) -> Counter[int]:
    """Return how often the network contains each of its modules and tensors, by id."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    tensors = [one for module in modules for one in (*module._parameters.values(), *module._buffers.values())]
    return Counter(id(one) for one in (*modules, *tensors))
