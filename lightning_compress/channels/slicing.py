"""Slice a model's tensors in place, keeping the Parameter objects, in a way that can be undone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.channels.attention import SliceableMultiheadAttention
from lightning_compress.channels.optimizer_state import slice_state
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.records import RecordError
from lightning_compress.core.tensors import Kept, select

Undo = Callable[[], None]

_Cut = tuple[Tensor, dict[int, Tensor]]  # a dense buffer, and by dimension the positions that stayed
DENSE = "_dense_buffers"  # attribute of a module whose non-persistent buffers were cut: by name a _Cut


class Slices:
    """A record of changes that slicing made; `undo` takes them back.

    Args:
        sparing: Whether to store only the positions that leave, and to rebuild the dense tensors in `undo`. This saves
            memory, and is for tensors without gradients whose memory nothing else shares, such as the sandbox's.
    """

    def __init__(self, *, sparing: bool = False) -> None:
        self._sparing = sparing
        self._undo: list[Undo] = []

    def undo(self) -> None:
        """Take all changes back, the last one first, and go on if one of them fails."""
        with ExitStack() as back:
            for undo in self._undo:
                back.callback(undo)
            self._undo.clear()

    def take(self, model: nn.Module, kept: Kept, *, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Slice parameters with their gradients, buffers, optimizer state, and the size attributes of modules.

        Raises:
            ValueError: An optimizer keeps state that cannot be sliced like its parameter; nothing changes.
        """
        try:
            modules = dict(model.named_modules(remove_duplicate=False))
            for name, dims in kept.items():
                module, _, attribute = name.rpartition(".")
                tensor = getattr(modules[module], attribute)
                if isinstance(tensor, nn.Parameter):
                    for optimizer in optimizers:
                        self._undo.append(slice_state(optimizer, tensor, dims, select))
                elif attribute in modules[module]._non_persistent_buffers_set:
                    self._remember(modules[module], attribute, dims)
                self._slice(tensor, dims)
            for module in dict.fromkeys(map(_owner, kept)):
                self._refresh(modules[module])
            for one in modules.values():
                if isinstance(one, SliceableMultiheadAttention):
                    before = dict(vars(one))
                    self._undo.append(partial(vars(one).update, before))
                    one.refresh(head_dim=one.head_dim)
        except BaseException:
            self.undo()
            raise

    def on_undo(self, undo: Undo) -> None:
        """Have `undo` call another function."""
        self._undo.append(undo)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, until `undo` sets it back."""
        old = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def _slice(self, tensor: Tensor, dims: Mapping[int, Tensor]) -> None:
        if self._sparing:
            for dim, keep in dims.items():
                self._take_apart(tensor, dim, keep.to(tensor.device))
            return
        data, gradient = tensor.data, tensor.grad

        def undo() -> None:
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient

        self._undo.append(undo)
        tensor.grad = None
        tensor.data = select(data, dims)
        if gradient is not None:
            tensor.grad = select(gradient, dims)

    def _take_apart(self, tensor: Tensor, dim: int, keep: Tensor) -> None:
        shape = tensor.shape
        leaves = torch.ones(shape[dim], dtype=torch.bool, device=tensor.device).index_fill_(0, keep, False)
        gone = leaves.nonzero().squeeze(1)
        left = tensor.data.index_select(dim, gone)

        def undo() -> None:
            dense = tensor.data.new_empty(shape).index_copy_(dim, gone, left)
            tensor.data = dense.index_copy_(dim, keep, tensor.data)

        self._undo.append(undo)
        tensor.data = select(tensor.data, {dim: keep})

    def _remember(self, module: nn.Module, name: str, dims: Mapping[int, Tensor]) -> None:
        """Store a dense buffer that no state dict holds, and the positions that stay in it."""
        known: dict[str, _Cut] = vars(module).get(DENSE, {})
        dense, before = known.get(name, (module.get_buffer(name).data, {}))
        here = {dim: before[dim][keep.cpu()] if dim in before else keep.cpu() for dim, keep in dims.items()}
        self._undo.append(partial(_set_dense, module, known))
        _set_dense(module, known | {name: (dense, before | here)})

    def _refresh(self, module: nn.Module) -> None:
        """Set the size attributes of one of torch's layers."""
        for name, value in sizes(module).items():
            if getattr(module, name) != value:
                self.set(module, name, value)


def _owner(name: str) -> str:
    """Return the path of the module whose tensor this is, or whose parametrized tensor is made from it."""
    path, parametrized, _ = f".{name}".partition(".parametrizations.")
    return (path if parametrized else path.rpartition(".")[0])[1:]


def _set_dense(module: nn.Module, known: dict[str, _Cut]) -> None:
    if known:
        vars(module)[DENSE] = known
    else:
        vars(module).pop(DENSE, None)


def positions_left(model: nn.Module) -> dict[str, dict[int, list[int]]]:
    """Return by name and dimension the positions that stayed of every non-persistent buffer that was cut."""
    return {
        f"{path}.{name}".lstrip("."): {dim: keep.tolist() for dim, keep in dims.items()}
        for path, module in model.named_modules()
        for name, (_, dims) in vars(module).get(DENSE, {}).items()
    }


def refit_buffers(model: nn.Module, positions: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
    """Slice the dense non-persistent buffers to some positions, and make the other buffers dense again.

    Args:
        model: The network, changed in place.
        positions: What `positions_left` returned for another network of the same class.

    Raises:
        RecordError: A buffer has fewer positions; no buffer changes.
    """
    changes: list[tuple[nn.Module, str, Tensor, dict[int, Tensor]]] = []
    for path, module in model.named_modules():
        known: dict[str, _Cut] = vars(module).get(DENSE, {})
        for name in module._non_persistent_buffers_set:
            where = positions.get(f"{path}.{name}".lstrip("."), {})
            buffer = module._buffers[name]
            if buffer is None or (not where and name not in known):
                continue
            dense = known[name][0] if name in known else buffer.data
            fits = all(dim < dense.dim() for dim in where)
            if name not in known and fits and all(dense.shape[dim] == len(keep) for dim, keep in where.items()):
                continue  # the class itself makes the buffer thin
            for dim, keep in where.items():
                if dim >= dense.dim() or max(keep) >= dense.shape[dim]:
                    raise RecordError(
                        f"The non-persistent buffer {name!r} of {path or type(model).__name__!r} has shape "
                        f"{tuple(dense.shape)}, and the network that was saved kept position {max(keep)} of its "
                        f"dimension {dim}: it was cut from another network."
                    )
            changes.append((module, name, dense, {dim: torch.tensor(keep) for dim, keep in where.items()}))
    for module, name, dense, dims in changes:
        buffer = module.get_buffer(name)
        buffer.data = select(dense.to(buffer), dims)
        rest = {other: cut for other, cut in vars(module).get(DENSE, {}).items() if other != name}
        _set_dense(module, rest | ({name: (dense, dims)} if dims else {}))


def sizes(module: nn.Module) -> dict[str, Any]:
    """Return the size attributes of one of torch's layers that fit its weight; none for other modules."""
    with evaluating(module) if is_parametrized(module, "weight") else nullcontext():  # it computes the weight anew
        weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[0], weight.shape[1] * module.groups
        names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return dict(zip(names, (first, second), strict=True))
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": weight.shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.shape[0]}
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None and isinstance(module, conv1d):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {}
