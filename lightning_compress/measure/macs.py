"""Counts the multiply-accumulates of one forward pass, and names the operators that are not counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call
from lightning_compress.core.hooks import hooked

# Operators that count as free by convention, besides views and those that torch tags as pointwise. Names are without
# "1d", "2d" or "3d" and without the "_" of in-place operators.
_FREE_BY_KIND = {
    "pooling": """_adaptive_avg_pool adaptive_max_pool avg_pool fractional_max_pool max_pool_with_indices max_unpool""",
    "normalisation": """
        _batch_norm_no_update _fused_rms_norm _log_softmax _masked_softmax _native_batch_norm_legit
        _native_batch_norm_legit_no_training _safe_softmax _softmax _weight_norm_interface cudnn_batch_norm
        miopen_batch_norm native_batch_norm native_group_norm native_layer_norm""",
    "reduction": """
        _aminmax all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min
        nansum norm prod std std_mean sum var var_mean""",
    "pointwise": """
        _prelu_kernel _thnn_fused_gru_cell _thnn_fused_lstm_cell complex elu gelu glu hardswish hardtanh leaky_relu
        log_sigmoid_forward masked_fill mish polar rrelu_with_noise rsub silu""",
    "copy": """
        _local_scalar_dense _reshape_copy _to_copy _unsafe_index _unsafe_index_put _unsafe_view
        _upsample_nearest_exact cat channel_shuffle clone constant_pad_nd copy diag_embed embedding fill flip gather
        im2col index index_copy index_fill index_put index_select masked_scatter masked_select nonzero pixel_shuffle
        pixel_unshuffle put reflection_pad repeat repeat_interleave replication_pad resize roll scatter select_scatter
        slice_scatter split_with_sizes_copy stack take tril triu unsafe_split unsafe_split_with_sizes
        upsample_nearest""",
    "creation": """
        _efficientzerotensor arange bernoulli empty empty_like empty_permuted empty_strided eye full full_like linspace
        new_empty new_empty_strided new_full new_ones new_zeros normal ones ones_like rand rand_like randint randn
        randn_like randperm scalar_tensor tril_indices triu_indices uniform zero zeros zeros_like""",
    "check": """_assert_async _assert_scalar _assert_tensor_metadata is_same_size""",
}
_FREE = frozenset(name for names in _FREE_BY_KIND.values() for name in names.split())
_SUFFIXES = re.compile(r"[123]d(?=_|$)|_$")


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> tuple[int, tuple[str, ...]]:
    """Return the multiply-accumulates per sample of one forward pass, and the operators that they leave out.

    The count is half of the FLOPs that torch's counter finds: a linear layer of shape (out, in) costs out * in, a
    convolution out * in / groups * kernel size * output positions. Operations with zeros count like all others, and
    attention counts as if no mask were given. Pointwise operators, copies, reductions, normalisation and pooling are
    free by convention.

    Args:
        model: The network, in the mode in which it is counted. It runs once.
        example_inputs: The inputs, batch first. The count is divided by the batch size and rounded down.

    Returns:
        The count, and the sorted names of the operators that ran, have no formula and are not free by convention.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10))
        (21600, ())
        >>> count_macs(nn.Identity(), torch.zeros(2, 4).cumsum(1).sort()[0])
        (0, ())
    """
    counter = FlopCounterMode(display=False)
    recorder = _Recorder()
    with torch.no_grad(), _unfused(), recorder, counter:  # outermost, the recorder sees what the counter decomposed
        call(model, example_inputs)
    uncounted = {name for name, packet in recorder.costly.items() if packet not in counter.flop_registry}
    return counter.get_total_flops() // 2 // batch_size(example_inputs), tuple(sorted(uncounted))


def macs_at_ends(model: nn.Module, example_inputs: ExampleInputs) -> tuple[dict[str, int], int]:
    """Return the multiply-accumulates of a batch up to the last end of each module, by its name, and those of all.

    Example:
        >>> macs_at_ends(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
        ({'0': 32, '1': 32, '2': 48}, 48)
    """
    counter = FlopCounterMode(display=False)
    ends: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda _module, _args, _output: ends.update({name: counter.get_total_flops() // 2})

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    with hooked(*handles), torch.no_grad(), _unfused(), counter:
        call(model, example_inputs)
    return ends, counter.get_total_flops() // 2


def macs_of_nodes(module: fx.GraphModule, *inputs: Any) -> dict[fx.Node, int]:
    """Return the multiply-accumulates of the nodes of a graph that has any, for a batch.

    Example:
        >>> found = macs_of_nodes(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU())), torch.zeros(3, 4))
        >>> [(node.name, macs) for node, macs in found.items()]
        [('_0', 96)]
    """
    counter = FlopCounterMode(display=False)
    found: dict[fx.Node, int] = {}

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            result = super().run_node(n)
            if (macs := (counter.get_total_flops() - before) // 2) > 0:
                found[n] = macs
            return result

    with torch.no_grad(), _unfused(), counter:
        Counting(module).run(*inputs)
    return found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operators that are not free by convention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costly: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_free(func):
            self.costly[str(func.overloadpacket)] = func.overloadpacket
        return func(*args, **(kwargs or {}))


def _is_free(func: Any) -> bool:
    if func.is_view or torch.Tag.inplace_view in func.tags or torch.Tag.pointwise in func.tags:
        return True
    namespace, _, name = str(func.overloadpacket).partition(".")
    return namespace == "aten" and _SUFFIXES.sub("", name) in _FREE


@contextmanager
def _unfused() -> Iterator[None]:
    """Prevent attention, transformer and recurrent layers from running as fused kernels, which can't be counted."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [backend.enabled for backend in backends]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for backend in backends:
            backend.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, was_enabled in zip(backends, enabled, strict=True):
            backend.enabled = was_enabled
        torch.backends.mha.set_fastpath_enabled(fast_path)
