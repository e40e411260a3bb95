"""Multi-head attention that still runs after channels or heads have been cut out of it.

torch's nn.MultiheadAttention takes every shape from one number: embed_dim is the width of the query, the number of
heads times their width, and the input width of out_proj. A cut of one of the three makes its forward pass fail. Here
every shape comes from the weights. With H heads of width D (values: V), queries of width E and outputs of width O:

    in_proj_weight   (3 H D, E)                 or, with kdim or vdim:  q_proj_weight  (H D, E)
    in_proj_bias     (3 H D) or (2 H D + H V)                           k_proj_weight  (H D, kdim)
    bias_k, bias_v   (1, 1, H D), (1, 1, H V)                           v_proj_weight  (H V, vdim)
    out_proj         (O, H V), (O)

A packed in_proj_weight has three equal parts, so that V = D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_compress.channels.attention_masks import merged_mask, shape_of


class SliceableMultiheadAttention(nn.MultiheadAttention):
    """Computes out_proj(concat_h(softmax(scale Q_h K_h^T + mask) V_h)) over as many heads as the weights have rows for.

    `make_sliceable` gives this class to a module; it has no constructor. The forward pass reads `head_dim`,
    `value_head_dim` and `scale`, and takes all other shapes from the weights. `scale` stays that of the original heads,
    so that narrower heads lose nothing but their missing channels' share of the scores. Averages over heads are over
    those that are left, and a 3-D `attn_mask` has N * H entries for the H that are left.

    torch.jit.script can read the forward pass, as it can that of torch.

    The class never takes the fast paths of nn.TransformerEncoderLayer and nn.MultiheadAttention. It pads a nested
    tensor, which nn.TransformerEncoder makes of padded input for these paths, and returns a nested one.

    Example:
        >>> attention = nn.MultiheadAttention(8, num_heads=4, batch_first=True)
        >>> undo = make_sliceable(attention)
        >>> heads = torch.tensor([0, 3])  # keep the first and the last
        >>> rows = torch.arange(24).view(3, 4, 2)[:, heads].flatten()
        >>> attention.in_proj_weight = nn.Parameter(attention.in_proj_weight[rows])
        >>> attention.in_proj_bias = nn.Parameter(attention.in_proj_bias[rows])
        >>> attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, rows[:4]])
        >>> attention.refresh(); attention.embed_dim, attention.num_heads, attention.head_dim
        (8, 2, 2)
        >>> x = torch.randn(1, 5, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([1, 5, 8])
    """

    if TYPE_CHECKING:  # torch.jit.script would read these as text
        scale: float
        value_head_dim: int
        in_proj_weight: Tensor | None  # type: ignore[assignment]
        in_proj_bias: Tensor | None  # type: ignore[assignment]
    __jit_unused_properties__: ClassVar[list[str]] = ["_qkv_same_embed_dim"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Build a torch.nn.MultiheadAttention and put this class on it with make_sliceable.")

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # TransformerEncoderLayer reads it before it gives the weights to a fused kernel, which needs dense shapes.
        # The property has precedence over the module's own entry of that name, which make_plain needs.
        return False

    def refresh(self, *, head_dim: int | None = None) -> None:
        """Set the attributes that follow from the weights' shapes, after a cut.

        The method sets embed_dim (the width of the query), kdim, vdim, num_heads (rows of the query's part / head_dim),
        head_dim, value_head_dim (rows of the value's part / num_heads) and the two sizes of out_proj.

        Args:
            head_dim: The width of the query's and the key's heads, if it has changed: fewer heads and narrower ones
                can have the same shapes.

        Raises:
            ValueError: The shapes do not fit each other; no attribute changes.
        """
        head_dim = self.head_dim if head_dim is None else head_dim
        (q_rows, embed_dim), (k_rows, kdim), (v_rows, vdim) = (weight.shape for weight in self._in_weights())
        num_heads = q_rows // head_dim if head_dim > 0 else 0
        if num_heads == 0 or num_heads * head_dim != q_rows:
            raise ValueError(
                f"{q_rows} rows for the query do not make heads of width {head_dim}. Cut whole heads and leave one, or "
                "as many rows out of every head, and then say refresh(head_dim=...)."
            )
        value_head_dim = v_rows // num_heads
        outputs, inputs = self.out_proj.weight.shape
        sizes = {  # the number that is there, and the one that fits
            "rows for the key": (k_rows, q_rows),
            "rows for the value": (v_rows, num_heads * max(value_head_dim, 1)),
            "columns of out_proj": (inputs, v_rows),
        }
        for name, vector, rows in (
            ("in_proj_bias", self.in_proj_bias, q_rows + k_rows + v_rows),
            ("bias_k", self.bias_k, k_rows),
            ("bias_v", self.bias_v, v_rows),
            ("out_proj.bias", self.out_proj.bias, outputs),
        ):
            if vector is not None:
                sizes[f"entries of {name}"] = vector.shape[-1], rows
        wrong = [f"{there} {name} instead of {fits}" for name, (there, fits) in sizes.items() if there != fits]
        if wrong:
            raise ValueError(
                f"The shapes do not fit the query's {num_heads} heads of width {head_dim}: {', '.join(wrong)}. Cut the "
                "same heads out of all of them."
            )
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.head_dim, self.value_head_dim = num_heads, head_dim, value_head_dim
        self.out_proj.in_features, self.out_proj.out_features = inputs, outputs

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what nn.MultiheadAttention returns for the same arguments; torch.fx does not trace into it either."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            leaf = leaf_of(self, given, {})
            if leaf is not None:
                return leaf  # type: ignore[return-value]
        lengths: list[int] = []
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or not (query is key and key is value):
                raise ValueError("Nested tensors are for self-attention without masks; pad them for anything else.")
            lengths = [sample.shape[0] for sample in query.unbind()]
            query = key = value = query.to_padded_tensor(0.0)
            ends = torch.tensor(lengths, device=query.device).unsqueeze(1)
            key_padding_mask = torch.arange(query.shape[1], device=query.device) >= ends
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True only says that attn_mask is the causal one: give attn_mask as well.")
        if query.dim() not in [2, 3] or query.dim() != key.dim() or key.dim() != value.dim():
            shapes = f"{shape_of(query)}, {shape_of(key)}, {shape_of(value)}"
            raise ValueError(f"query, key and value must all be 3-D, or all 2-D without a batch; got {shapes}.")

        q, k, v = self._project(query, key, value)
        q, k, v = self._split(q, self.head_dim), self._split(k, self.head_dim), self._split(v, self.value_head_dim)
        mask: Tensor | None = None
        if not (is_causal and key_padding_mask is None and not need_weights):  # else the kernel makes the mask itself
            mask = merged_mask(attn_mask, key_padding_mask, q, k)
            is_causal = False
        if self.bias_k is not None and self.bias_v is not None:
            k, v = _append(k, self.bias_k), _append(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, [0, 0, 0, 1]), F.pad(v, [0, 0, 0, 1])
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None and appended > 0:  # appended keys are never masked
            mask = F.pad(mask, [0, appended])

        averaged: Tensor | None = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask
            weights = scores.softmax(dim=-1)
            if dropout > 0:
                weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            averaged = weights if query.dim() == 3 else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)

        # the weight and not the layer: a hook on out_proj does not run in torch either
        out = F.linear(heads.permute(2, 0, 1, 3).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if query.dim() == 2:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(
                0, 1
            )  # the same layout in memory as in torch, so that a dropout after it draws the same numbers
        if len(lengths) > 0:
            if averaged is not None and key_padding_mask is not None:  # as in the fast path
                missing = key_padding_mask.unsqueeze(-1)
                averaged = averaged.masked_fill(missing if average_attn_weights else missing.unsqueeze(1), 0.0)
            out = torch._nested_tensor_from_tensor_list([out[i, :length] for i, length in enumerate(lengths)])
        return out, averaged

    def _in_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        q, k, v = self.in_proj_weight.chunk(3)
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        w_q, w_k, w_v = self._in_weights()
        if self.in_proj_bias is None:
            return F.linear(query, w_q), F.linear(key, w_k), F.linear(value, w_v)
        b_q, b_k, b_v = torch.split(self.in_proj_bias, [w_q.shape[0], w_k.shape[0], w_v.shape[0]])
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _split(self, x: Tensor, width: int) -> Tensor:
        """Reshape (N, L, H * width), (L, N, H * width) or (L, H * width) to (N, H, L, width)."""
        x = torch.unflatten(x, -1, [-1, width])
        if x.dim() == 3:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)


def leaf_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy | None:
    """Return the proxy with which torch.fx records a call without tracing into it; None if torch.fx is not tracing."""
    for proxy in (*args, *kwargs.values()):  # a plain loop: torch.compile below 2.7 knows no `next` with a default
        if isinstance(proxy, fx.Proxy) and isinstance(proxy.tracer, fx.Tracer):
            return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, kwargs)
    return None


def make_sliceable(module: nn.MultiheadAttention) -> Callable[[], None]:
    """Turn the module, in place, into one that can be cut; return a function that turns it back (see `make_plain`).

    Parameters, their names, hooks and outputs stay the same. A sliceable module does not change.

    Raises:
        TypeError: The module is of another subclass, whose own forward pass would be lost.

    Example:
        >>> attention = nn.MultiheadAttention(8, num_heads=2)
        >>> undo = make_sliceable(attention); type(attention).__name__
        'SliceableMultiheadAttention'
        >>> undo(); type(attention).__name__
        'MultiheadAttention'
    """
    if isinstance(module, SliceableMultiheadAttention):
        return lambda: None
    if type(module) is not nn.MultiheadAttention:
        raise TypeError(
            "make_sliceable replaces the forward pass of torch.nn.MultiheadAttention itself, and "
            f"{type(module).__name__} may have its own. Make parametrizations permanent; leave other subclasses out."
        )
    module.__class__ = SliceableMultiheadAttention
    assert isinstance(module, SliceableMultiheadAttention)
    module.scale, module.value_head_dim = module.head_dim**-0.5, module.head_dim
    return lambda: make_plain(module)


def make_plain(module: nn.MultiheadAttention) -> None:
    """Turn a sliceable module back, in place, into a torch.nn.MultiheadAttention; a plain one does not change.

    After a cut this works where E = H * D, D = V and D has not changed, that is, where whole heads and as many channels
    of the query as these had were cut.

    Raises:
        ValueError: nn.MultiheadAttention cannot run the module's shapes; the module stays sliceable.
    """
    if type(module) is not SliceableMultiheadAttention:
        return
    module.refresh()
    width, same_scale = module.num_heads * module.head_dim, module.head_dim**-0.5 == module.scale
    if not (module.embed_dim == width and module.head_dim == module.value_head_dim and same_scale):
        raise ValueError(
            f"nn.MultiheadAttention cannot run these shapes: queries of width {module.embed_dim}, {module.num_heads} "
            f"heads of width {module.head_dim} (values: {module.value_head_dim}) with scores scaled by "
            f"{module.scale:.4g}. Leave the module sliceable."
        )
    del module.scale, module.value_head_dim
    module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]


def _append(x: Tensor, bias: Tensor) -> Tensor:
    """Append a bias (1, 1, H * width) to keys or values (N, H, S, width) as one more place."""
    row = torch.unflatten(bias, -1, [-1, x.shape[-1]]).transpose(1, 2)
    return torch.cat([x, row.expand(x.shape[0], -1, -1, -1)], dim=2)
