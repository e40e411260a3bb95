"""A copy of a network for one width: modules of the same classes, with the numbers that fewer channels need.

    copied    modules with tensors that get thinner, and modules of the user's own classes, with what they hold
    shared    layers of torch that stay as they are, such as activations; the hooks of every module; trainers, loggers,
              metrics, random generators, data and optimizers that a module holds

So a hook that is added to a layer later runs in every width, and no forward pass at one width writes into what another
width caches.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Collection
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_compress.channels.groups import Drop
from lightning_compress.channels.removal import take
from lightning_compress.channels.slicing import DENSE, Slices
from lightning_compress.core.answering import Answer

_SHARED_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
_NO_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_LIBRARIES = ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "lightning_compress")
_SHARED = (torch.Generator, torch.optim.Optimizer, DataLoader, Dataset, Sampler)
_PROXIES = weakref.ProxyTypes  # deepcopy would copy what they stand for


def skeleton_of(
    network: nn.Module, drop: Drop, sliced: Collection[int], copied: Collection[str], left_out: str
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Return a copy of a network that has the sizes of a cut, and the copies by the modules that have one.

    Args:
        network: Stays as it is.
        drop: The channels that leave.
        sliced: Ids of the tensors that the cut slices. The copy has placeholders for them, of undefined values.
        copied: Paths of modules that are copied although they could be shared.
        left_out: Name of a child that the copy does not get.

    Raises:
        ValueError: A module has a forward that can't be copied, or holds something else that can't.
    """
    paths = dict(network.named_modules(remove_duplicate=False))
    apart = {id(paths[one.module]) for group, _ in drop for one in group.attributes if one.module in paths}
    apart |= {id(network)} | {id(paths[path]) for path in copied}
    memo: dict[int, Any] = {}
    for path, module in paths.items():
        if id(module) not in apart and _may_be_shared(module, sliced):
            memo[id(module)] = module
        else:
            _check_forward(path, module)
            memo |= _shared_within(module, sliced)
    child = network._modules.get(left_out)
    memo[id(child)] = None
    try:
        with torch.no_grad():
            skeleton = copy.deepcopy(network, memo)
    except Exception as error:
        raise ValueError(
            f"{type(network).__name__} can't get a copy for a smaller width, because copy.deepcopy fails: {error}"
        ) from error
    skeleton._modules.pop(left_out, None)
    found = {module: memo[id(module)] for module in network.modules() if module is not child and id(module) in memo}
    copies = {module: one for module, one in found.items() if isinstance(one, nn.Module) and one is not module}
    for module, one in copies.items():
        if vars(one).get("forward", one) is None:
            del vars(one)["forward"]
        if "_trainer" in vars(module):  # which a copy of a LightningModule forgets
            vars(one)["_trainer"] = vars(module)["_trainer"]
    take(Slices(), skeleton, drop)
    for one in copies.values():
        vars(one).pop(DENSE, None)  # those of the network itself are what a state dict follows
    return skeleton, copies


def _may_be_shared(module: nn.Module, sliced: Collection[int]) -> bool:
    """Return whether a module stays as it is at every width, and caches nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if any(id(one) in sliced for one in (*module.parameters(), *module.buffers())):
        return False
    kinds = {type(one).__module__.partition(".")[0] for one in module.modules()}
    return kinds <= {"torch", "torchmetrics"} and (kinds == {"torchmetrics"} or not module._modules)


def _check_forward(path: str, module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, FunctionType) and not isinstance(module, torch._dynamo.OptimizedModule):
        raise ValueError(
            f"{path or 'The network'} ({type(module).__name__}) has a function in place of its class's forward, which "
            f"would go on calling the full network at every width: write a class with that forward."
        )


def _shared_within(module: nn.Module, sliced: Collection[int]) -> dict[int, Any]:
    """Return by id what deepcopy puts in place of what a module holds."""
    entries = vars(module)
    found: dict[int, Any] = {id(entries[name]): entries[name] for name in _SHARED_HOOKS}
    found |= {id(entries[name]): OrderedDict() for name in _NO_HOOKS}
    forward = entries.get("forward")
    if isinstance(forward, Answer) or getattr(forward, "__func__", None) is type(module).forward:
        found[id(forward)] = None  # the class's own answers; Lightning leaves a bound method of it there
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            found[id(tensor)] = _placeholder(tensor) if id(tensor) in sliced else tensor
    left = [value for name, value in entries.items() if name not in ("_parameters", "_buffers", "_modules")]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if id(one) in seen or id(one) in found:
            continue
        seen.add(id(one))
        if isinstance(one, dict | list | tuple | set):
            left.extend(one.values() if isinstance(one, dict) else one)
        elif isinstance(one, Tensor):
            if not one.is_leaf:  # such as an output that it has stored, which deepcopy refuses
                found[id(one)] = one
        elif is_shared(one):
            found[id(one)] = one
    return found


def is_shared(value: Any) -> bool:
    """Return whether a copy of a module has the same object as the module, as a trainer or a random generator."""
    if type(value) in _PROXIES or isinstance(value, _SHARED):
        return True
    return type(value).__module__.partition(".")[0] in _LIBRARIES and not isinstance(value, nn.Module)


def _placeholder(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()
