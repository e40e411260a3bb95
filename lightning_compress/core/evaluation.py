"""Run a network without changing it: modes, buffers and random states are restored.

The restoration is complete even if the network's own code raises an error: each of its steps runs, although an earlier
one has failed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore modes, buffers and random states afterwards.

    Every submodule gets its own mode back, and buffers that the forward pass wrote, replaced or added are restored.
    Inference mode is not used, because autograd refuses tensors that a network caches there.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with evaluating(net):
        ...     net.training, net(torch.ones(3, 2)).requires_grad
        (False, False)
        >>> net.training
        True
    """
    with random_state_restored(model), torch.no_grad(), buffers_restored(model), modes_restored(model):
        set_mode(model, False)
        yield


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module after a `with` block, by calling `train`, which some modules override."""
    mode, modes = model.training, [(module, module.training) for module in model.modules()]
    with ExitStack() as back:
        for module, training in modes:
            back.callback(setattr, module, "training", training)
        back.callback(set_mode, model, mode)
        yield


def set_mode(module: nn.Module, training: bool) -> None:
    """Call `train`; where a module refuses the call, as those of torch.export do, set the modes of its children."""
    try:
        module.train(training)
    except NotImplementedError:
        for child in module.children():
            set_mode(child, training)
        module.training = training


def renew_caches(model: nn.Module) -> None:
    """Make modules drop or renew the caches that they keep for evaluation, by switching their mode to and fro."""
    with modes_restored(model):
        set_mode(model, not model.training)


@contextmanager
def random_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy after a `with` block."""
    cuda_devices = sorted({buffer.device.index for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda})
    with torch.random.fork_rng(cuda_devices), ExitStack() as back:
        back.callback(random.setstate, random.getstate())
        back.callback(np.random.set_state, np.random.get_state())
        yield


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore the buffers that a `with` block writes, replaces or adds."""
    tables = [(module, module._buffers, dict(module._buffers.items())) for module in model.modules()]
    with ExitStack() as back:
        back.enter_context(_values_restored(model.buffers()))
        for module, _, registered in tables:
            back.callback(_restore_buffers, module, registered)
        yield


def _restore_buffers(module: nn.Module, registered: dict[str, Tensor | None]) -> None:
    for name in set(module._buffers.keys()) - registered.keys():
        delattr(module, name)
    for name, buffer in registered.items():
        if module._buffers[name] is not buffer:
            module._buffers[name] = buffer


@contextmanager
def _values_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values that a `with` block writes into tensors."""
    with ExitStack() as back:
        for tensor in tensors:
            back.callback(_restore_value, tensor, tensor.data, tensor.detach().clone())
        yield


def _restore_value(tensor: Tensor, data: Tensor, value: Tensor) -> None:
    if tensor.dtype != value.dtype or tensor.shape != value.shape:
        tensor.data = data if data.shape == value.shape else value
    with torch.no_grad():
        if not torch.equal(tensor, value):  # autograd counts every write, even of equal values
            tensor.copy_(value)


@contextmanager
def entries_restored(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of modules, and the containers in them, after a `with` block.

    The containers are dicts, lists, sets, tensors, random generators and objects of the network's own classes. A
    forward pass may store masks, tables, counters or hooks in them.

    Raises:
        ValueError: A layer is lazy: the first pass gives it shapes and another class, which nothing can take back.
    """
    if lazy := next((name for name, one in model.named_parameters() if is_lazy(one)), None):
        raise ValueError(f"{lazy} is a lazy parameter without a shape: run one batch through the model first.")
    modules = list(model.modules())
    containers, tensors, generators = _held_state(modules)
    with ExitStack() as back:
        back.enter_context(_values_restored(tensors))
        for generator in generators:
            back.callback(generator.set_state, generator.get_state())
        for container in containers:
            back.callback(_refill, container, _content(container))
        for module in modules:
            back.callback(_restore_entries, vars(module), dict(vars(module)))
        yield


def _restore_entries(mine: dict[str, Any], before: dict[str, Any]) -> None:
    for name in mine.keys() - before.keys():
        del mine[name]
    mine.update(before)


def _refill(container: Any, content: list[Any]) -> None:
    now = _content(container)
    if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
        return
    container.clear()
    if isinstance(container, dict):
        keys, values = content[: len(content) // 2], content[len(content) // 2 :]
        container.update(zip(keys, values, strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Make language models of `transformers` return no cache of keys and values for the next token.

    torch.export does not know the class of the cache, whose content is no prediction of the network.
    """
    configs = [vars(one) for module in model.modules() if hasattr(one := vars(module).get("config"), "__dict__")]
    using = [config for config in configs if config.get("use_cache") is True]
    try:
        for config in using:
            config["use_cache"] = False
        yield
    finally:
        for config in using:
            config["use_cache"] = True


def take_rounding_away(model: nn.Module) -> None:
    """Remove the hooks that round inputs (their attribute `rounds` is true), inside a block of `entries_restored`.

    Rounding acts on each entry alone, so that a cut does not affect it, but it enlarges the smallest differences
    between the outputs of two networks.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "rounds", False)]:
            del hooks[key]


_LIBRARIES = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "builtins", "functools")


def _held_state(modules: Iterable[nn.Module]) -> tuple[list[Any], list[Tensor], list[torch.Generator]]:
    """Find the containers, tensors and generators that modules hold, besides parameters and buffers."""
    containers: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    generators: dict[int, torch.Generator] = {}
    tables = {id(table) for module in modules for table in (module._parameters, module._buffers, module._modules)}
    for module in modules:  # their content is restored too, but not searched for more
        containers |= {id(one): one for one in vars(module).values() if id(one) in tables and isinstance(one, dict)}
    left: list[Any] = [value for module in modules for value in vars(module).values()]
    objects: list[Any] = []  # tensors in them are not restored: an object may hold a whole data set
    while left or objects:
        direct = bool(left)
        one = left.pop() if direct else objects.pop()
        if id(one) in containers:
            continue
        if isinstance(one, dict | list | set | deque):
            containers[id(one)] = one
            (left if direct else objects).extend(one.values() if isinstance(one, dict) else one)
        elif isinstance(one, tuple):
            (left if direct else objects).extend(one)
        elif isinstance(one, torch.Generator):
            generators[id(one)] = one
        elif type(one) is Tensor:
            if direct and one.layout is torch.strided and not one.is_meta:
                tensors[id(one)] = one
        elif not isinstance(one, type) and type(one).__module__.partition(".")[0] not in _LIBRARIES:
            objects.append(getattr(one, "__dict__", None))
    return list(containers.values()), list(tensors.values()), list(generators.values())


def _content(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
