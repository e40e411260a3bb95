"""The oracle is torch's own nn.MultiheadAttention: as it is, or with what was cut out set to zero."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels import cut as cut_channels
from lightning_compress.channels.attention import SliceableMultiheadAttention, make_plain, make_sliceable

E, N, L, S = 12, 3, 5, 7  # width, batch, queries, keys
INFINITE = float("-inf")

MODULES: dict[str, dict[str, Any]] = {
    "batch first": {"num_heads": 4, "batch_first": True},
    "sequence first": {"num_heads": 4},
    "three heads, no bias": {"num_heads": 3, "bias": False, "batch_first": True},
    "bias_kv": {"num_heads": 4, "add_bias_kv": True, "batch_first": True},
    "zero_attn, sequence first": {"num_heads": 2, "add_zero_attn": True},
    "bias_kv, zero_attn, no bias": {"num_heads": 4, "add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim, vdim": {"num_heads": 4, "kdim": 10, "vdim": 6, "batch_first": True},
    "vdim, no bias, bias_kv": {"num_heads": 3, "vdim": 5, "bias": False, "add_bias_kv": True},
}
MASKS = ["none", "padding", "float padding", "mask", "float mask", "3-D", "float 3-D", "both", "float both"]
MASKS += ["causal", "causal padding"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(name: str = "batch first", **options: Any) -> nn.MultiheadAttention:
    """A module in which no parameter is at its initial zero or one."""
    module = nn.MultiheadAttention(E, **{**MODULES[name], **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def sliceable(module: nn.MultiheadAttention) -> SliceableMultiheadAttention:
    twin = copy.deepcopy(module)
    make_sliceable(twin)
    assert isinstance(twin, SliceableMultiheadAttention)
    return twin


def inputs(module: nn.MultiheadAttention, *, batched: bool = True, cross: bool = True) -> tuple[Tensor, ...]:
    if not cross:
        x = torch.randn(N, L, E) if batched else torch.randn(L, E)
        x = x.transpose(0, 1) if batched and not module.batch_first else x
        return x, x, x
    made = [torch.randn(N, L, E), torch.randn(N, S, module.kdim), torch.randn(N, S, module.vdim)]
    if not batched:
        return tuple(x[0] for x in made)
    return tuple(x if module.batch_first else x.transpose(0, 1) for x in made)


def masks(name: str, heads: int, *, batched: bool, keys: int) -> dict[str, Any]:
    """No query without a key: what torch makes of that depends on the kernel."""
    batch = N if batched else 1

    def hide(*shape: int) -> Tensor:
        mask = torch.rand(shape) > 0.6
        mask[..., 0] = False
        return mask

    padding = hide(N, keys) if batched else hide(keys)
    float_padding, weights = torch.randn(padding.shape), torch.randn(batch * heads, L, keys)
    causal = {"attn_mask": torch.full((L, keys), INFINITE).triu(1), "is_causal": True}
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": float_padding},
        "mask": {"attn_mask": hide(L, keys)},
        "float mask": {"attn_mask": weights[0]},
        "3-D": {"attn_mask": hide(batch * heads, L, keys)},
        "float 3-D": {"attn_mask": weights},
        "both": {"attn_mask": hide(batch * heads, L, keys), "key_padding_mask": padding},
        "float both": {"attn_mask": weights[0], "key_padding_mask": float_padding},
        "causal": causal,
        "causal padding": {**causal, "key_padding_mask": float_padding},
    }[name]


def calls(module: nn.MultiheadAttention, mask: str) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    same_width = module.kdim == module.vdim == E
    for batched in (True, False):
        for cross in (True, False) if same_width else (True,):
            given = inputs(module, batched=batched, cross=cross)
            options = masks(mask, module.num_heads, batched=batched, keys=S if cross else L)
            for weights in ((False, True), (True, True), (True, False)):
                yield given, {**options, "need_weights": weights[0], "average_attn_weights": weights[1]}
    if same_width:  # one tensor for key and value, another for the query
        query, key, _ = inputs(module)
        options = masks(mask, module.num_heads, batched=True, keys=S)
        yield (query, key, key), {**options, "need_weights": False}


def assert_same(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-4)
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_the_original(name: str, mask: str) -> None:
    module = build(name)
    twin = sliceable(module)
    for given, options in calls(module, mask):
        assert_same(twin(*given, **options), module(*given, **options))
        with torch.no_grad():  # which lets the original take its fast path
            assert_same(twin.eval()(*given, **options), module.eval()(*given, **options))
        module.train(), twin.train()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_original(name: str, need_weights: bool) -> None:
    module = build(name)
    twin = sliceable(module)
    given = inputs(module)
    gradients = []
    for attention in (module, twin):
        leaves = [x.clone().requires_grad_() for x in given]
        attention(*leaves, need_weights=need_weights)[0].square().sum().backward()
        gradients.append([x.grad for x in leaves] + [p.grad for p in attention.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def mapped(tensors: tuple[Tensor, ...], function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What was one tensor stays one, as self-attention is told by identity."""
    made = {id(x): function(x) for x in tensors}
    return tuple(made[id(x)] for x in tensors)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["none", "both", "float mask", "causal"])
@pytest.mark.parametrize("name", ["batch first", "bias_kv", "zero_attn, sequence first", "kdim, vdim"])
def test_half_precision_is_as_good_as_the_original(name: str, mask: str, autocast: bool) -> None:
    exact = build(name)
    module = exact if autocast else copy.deepcopy(exact).bfloat16()
    twin = sliceable(module)
    errors: dict[tuple[str, int], float] = defaultdict(float)
    for given, options in calls(exact, mask):
        right = exact(*given, **options)
        if not autocast:
            given = mapped(given, Tensor.bfloat16)
            for key, value in options.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    options[key] = value.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, got = module(*given, **options), twin(*given, **options)
        for i, (ours, theirs, truth) in enumerate(zip(got, expected, right, strict=True)):
            if truth is None:
                assert ours is theirs is None
            else:
                assert ours.dtype == theirs.dtype
                errors["ours", i] += (ours - truth).square().mean().item()
                errors["theirs", i] += (theirs - truth).square().mean().item()
    for i in range(2):
        # torch adds a mask to the scores before it rounds them, ours after
        assert 0 < errors["ours", i] < 2.5 * errors["theirs", i] < 0.02


def test_dropout_is_on_the_weights() -> None:
    twin = sliceable(build(dropout=0.25, bias=False))
    given = inputs(twin)
    kept = twin.eval()(*given, average_attn_weights=False)[1]
    out, weights = twin.train()(*given, average_attn_weights=False)
    dropped = weights == 0
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(weights, torch.where(dropped, 0.0, kept / 0.75))

    value = nn.functional.linear(given[2], twin.in_proj_weight[2 * E :]).view(N, S, 4, 3)
    by_hand = torch.einsum("nhls,nshd->nlhd", weights, value).flatten(-2) @ twin.out_proj.weight.T
    torch.testing.assert_close(out, by_hand, atol=1e-5, rtol=1e-4)


def test_dropout_in_the_kernel_is_right_on_average() -> None:
    twin = sliceable(build(dropout=0.25))
    given = inputs(twin)
    with torch.no_grad():
        draws = torch.stack([twin.train()(*given, need_weights=False)[0] for _ in range(2000)])
        expected = twin.eval()(*given, need_weights=False)[0]
    assert draws.std(0).min() > 0.01
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 2000**0.5).all()


# ---- cut -------------------------------------------------------------------------------------------------------------

HEADS, WIDTH = 4, 3  # of E = 12


@dataclass(frozen=True)
class Cut:
    """What is kept: heads, channels of a head for query and key and for the value, and channels of the network."""

    heads: tuple[int, ...] = (0, 1, 2, 3)
    qk_channels: tuple[int, ...] = (0, 1, 2)
    v_channels: tuple[int, ...] = (0, 1, 2)
    network: tuple[int, ...] = tuple(range(E))

    @property
    def outside(self) -> Tensor:
        return torch.tensor(self.network)

    @property
    def qk(self) -> Tensor:
        return torch.tensor([head * WIDTH + channel for head in self.heads for channel in self.qk_channels])

    @property
    def v(self) -> Tensor:
        return torch.tensor([head * WIDTH + channel for head in self.heads for channel in self.v_channels])

    @property
    def vectors(self) -> dict[str, Tensor]:
        return {"in_proj_bias": torch.cat([self.qk, E + self.qk, 2 * E + self.v]), "bias_k": self.qk, "bias_v": self.v}

    @torch.no_grad()
    def zero(self, module: nn.MultiheadAttention) -> nn.MultiheadAttention:
        """The dense oracle: nothing comes out of what is cut, nothing goes in from it."""
        dense = copy.deepcopy(module)

        def keep(tensor: Tensor, dim: int, kept: Tensor) -> None:
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[kept] = False
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)

        if dense.in_proj_weight is not None:
            parts = list(dense.in_proj_weight.chunk(3))
            for part in parts:
                keep(part, 1, self.outside)
        else:
            parts = [dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight]
            keep(parts[0], 1, self.outside)
        for part, kept in zip(parts, (self.qk, self.qk, self.v), strict=True):
            keep(part, 0, kept)
        for name, kept in self.vectors.items():
            if getattr(dense, name) is not None:
                keep(getattr(dense, name), -1, kept)
        keep(dense.out_proj.weight, 1, self.v)
        return dense

    def slice(self, module: nn.MultiheadAttention) -> SliceableMultiheadAttention:
        twin = sliceable(module)

        def put(owner: nn.Module, name: str, value: Tensor) -> None:
            setattr(owner, name, nn.Parameter(value.detach().clone()))

        if twin.in_proj_weight is not None:
            rows = torch.cat([self.qk, E + self.qk, 2 * E + self.v])
            put(twin, "in_proj_weight", twin.in_proj_weight[rows][:, self.outside])
        else:
            put(twin, "q_proj_weight", twin.q_proj_weight[self.qk][:, self.outside])
            put(twin, "k_proj_weight", twin.k_proj_weight[self.qk])
            put(twin, "v_proj_weight", twin.v_proj_weight[self.v])
        for name, kept in self.vectors.items():
            if getattr(twin, name) is not None:
                put(twin, name, getattr(twin, name)[..., kept])
        put(twin.out_proj, "weight", twin.out_proj.weight[self.outside][:, self.v])
        if twin.out_proj.bias is not None:
            put(twin.out_proj, "bias", twin.out_proj.bias[self.outside])
        twin.refresh(head_dim=len(self.qk_channels))
        return twin


THIN = (0, 2, 3, 7, 11)
CUTS = {
    "nothing": Cut(),
    "heads": Cut((0, 1, 3)),
    "all heads but one": Cut((2,)),
    "head width": Cut(qk_channels=(0, 2), v_channels=(0, 2)),
    "network": Cut(network=THIN),
    "everything": Cut((1, 2), (1,), (1,), THIN),
}
UNPACKED = {  # a packed weight has three equal parts
    "query and key width": Cut(qk_channels=(1,)),
    "value width, heads": Cut((0, 3), v_channels=(0, 2), network=THIN),
}
CUT_MODULES = [(name, cut) for name, options in MODULES.items() if options["num_heads"] == HEADS for cut in CUTS]
CUT_MODULES += [("kdim, vdim", cut) for cut in UNPACKED]


@pytest.mark.parametrize("mask", ["none", "padding", "float mask", "causal"])
@pytest.mark.parametrize(("name", "cut"), CUT_MODULES)
def test_thin_modules_compute_what_the_dense_one_does_with_zeros(name: str, cut: str, mask: str) -> None:
    module, kept = build(name), (CUTS | UNPACKED)[cut]
    dense, thin = kept.zero(module), kept.slice(module)
    for given, options in calls(module, mask):
        options = {**options, "average_attn_weights": False}
        expected, weights = dense(*given, **options)
        weights = None if weights is None else weights[..., kept.heads, :, :]
        # kdim and vdim are those of another network, of which nothing is cut
        less = mapped(given, lambda x: x[..., kept.outside] if x.shape[-1] == E else x)
        assert_same(thin(*less, **options), (expected[..., kept.outside], weights))


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name, cut in CUT_MODULES if cut != "network"])
def test_thin_modules_are_scripted_as_those_of_torch_are(name: str, cut: str) -> None:
    module = build(name)
    thin = (CUTS | UNPACKED)[cut].slice(module)
    scripted = torch.jit.script(thin)
    for mask in ("none", "padding", "float mask", "causal"):
        for given, options in calls(module, mask):
            less = [x[..., : thin.embed_dim] if x.shape[-1] == E else x for x in given]
            assert_same(scripted(*less, **options), thin(*less, **options))
    with pytest.raises(torch.jit.Error, match="query, key and value must all be 3-D"):
        scripted(*(x[None] for x in inputs(module)))


def test_a_scripted_encoder_with_fewer_heads() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True), 2).eval()
    x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([[3], [L], [1]])
    thin = cut_channels(encoder, (x, None, padding), keep={"layers.0.self_attn.in_proj_weight": [1, 2]})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.jit.script(thin)(x, src_key_padding_mask=padding), thin(x, src_key_padding_mask=padding)
        )


def test_weights_are_averaged_over_the_heads_that_are_left() -> None:
    thin = CUTS["heads"].slice(build())
    x, _, _ = inputs(thin, cross=False)
    each = thin(x, x, x, average_attn_weights=False)[1]
    assert each.shape == (N, 3, L, L)
    torch.testing.assert_close(thin(x, x, x)[1], each.mean(1))


def test_masks_per_head_are_for_the_heads_that_are_left() -> None:
    module = build()
    kept = CUTS["heads"]
    x, _, _ = inputs(module, cross=False)
    mask = torch.randn(N, HEADS, L, L)
    expected = kept.zero(module)(x, x, x, attn_mask=mask.flatten(0, 1), need_weights=False)
    got = kept.slice(module)(x, x, x, attn_mask=mask[:, kept.heads].flatten(0, 1), need_weights=False)
    assert_same(got, expected)
    with pytest.raises(ValueError, match=r"\(12, 5, 5\), expected \(5, 5\) or, for 3 samples and 3 heads, \(9, 5, 5\)"):
        kept.slice(module)(x, x, x, attn_mask=mask.flatten(0, 1))


def test_whole_heads_go_without_a_word() -> None:
    """The forward pass needs no refresh after a cut of heads or of outer channels."""
    module = build()
    kept = Cut((0, 2), network=THIN)
    refreshed, stale = kept.slice(module), kept.slice(module)
    stale.embed_dim, stale.num_heads, stale.kdim, stale.vdim = E, HEADS, E, E
    x = torch.randn(N, L, len(kept.outside))
    assert torch.equal(stale(x, x, x)[0], refreshed(x, x, x)[0])
    with pytest.raises(ValueError, match="queries of width 5, 2 heads"):
        make_plain(stale)


def test_refresh_reads_the_shapes() -> None:
    def attributes(module: SliceableMultiheadAttention) -> dict[str, int]:
        names = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "value_head_dim")
        out = module.out_proj
        return {name: getattr(module, name) for name in names} | {"out": out.out_features, "in": out.in_features}

    packed = CUTS["everything"].slice(build())
    assert attributes(packed) == dict(
        embed_dim=5, kdim=5, vdim=5, num_heads=2, head_dim=1, value_head_dim=1, out=5, **{"in": 2}
    )
    separate = UNPACKED["value width, heads"].slice(build("kdim, vdim"))
    assert attributes(separate) == dict(
        embed_dim=5, kdim=10, vdim=6, num_heads=2, head_dim=3, value_head_dim=2, out=5, **{"in": 4}
    )
    for module in (packed, separate):
        before = attributes(module)
        module.refresh()
        assert attributes(module) == before


def shorter(module: nn.Module, name: str, dim: int, size: int) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach().narrow(dim, 0, size)))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "batch first",
            lambda m: shorter(m, "in_proj_weight", 0, 30),
            "10 rows for the query do not make heads",
        ),
        ("kdim, vdim", lambda m: shorter(m, "q_proj_weight", 0, 9), "12 rows for the key instead of 9"),
        ("kdim, vdim", lambda m: shorter(m, "v_proj_weight", 0, 9), "9 rows for the value instead of 8"),
        ("batch first", lambda m: shorter(m.out_proj, "weight", 1, 9), "9 columns of out_proj instead of 12"),
        ("batch first", lambda m: shorter(m.out_proj, "weight", 0, 9), "12 entries of out_proj.* instead of 9"),
        ("batch first", lambda m: shorter(m, "in_proj_bias", 0, 27), "27 entries of in_proj_bias instead of 36"),
        ("bias_kv", lambda m: shorter(m, "bias_k", 2, 9), "9 entries of bias_k instead of 12"),
        ("bias_kv", lambda m: shorter(m, "bias_v", 2, 9), "9 entries of bias_v instead of 12"),
        ("batch first", lambda m: setattr(m, "head_dim", 0), "do not make heads of width 0"),
        ("batch first", lambda m: shorter(m, "in_proj_weight", 0, 0), "0 rows for the query"),
        ("kdim, vdim", lambda m: shorter(m, "v_proj_weight", 0, 0), "0 rows for the value instead of 4"),
    ],
)
def test_refresh_refuses_shapes_that_do_not_fit(name: str, spoil: Callable[[Any], None], message: str) -> None:
    module = sliceable(build(name))
    spoil(module)
    with pytest.raises(ValueError, match=message):
        module.refresh()
    assert (module.embed_dim, module.num_heads, module.value_head_dim) == (E, HEADS, WIDTH)


# ---- in place, and back ----------------------------------------------------------------------------------------------


def test_there_and_back_leaves_the_module_as_it_was() -> None:
    module = build()
    ran: list[str] = []
    module.register_forward_hook(lambda *_: ran.append("hook"))
    module.register_forward_pre_hook(lambda *_: ran.append("pre"))
    module.out_proj.register_forward_hook(lambda *_: ran.append("never, as in torch"))
    attributes, parameters = dict(vars(module)), dict(module.named_parameters())
    given = inputs(module)
    expected = module(*given)

    undo = make_sliceable(module)
    assert isinstance(module, SliceableMultiheadAttention)
    assert isinstance(module, nn.MultiheadAttention)
    assert list(module.state_dict()) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    ran.clear()
    assert_same(module(*given), expected)
    assert ran == ["pre", "hook"]

    make_sliceable(module)()  # sliceable already: not this one's to undo
    assert isinstance(module, SliceableMultiheadAttention)
    undo()
    undo()
    assert type(module) is nn.MultiheadAttention
    assert vars(module) == attributes
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_sliceable_too(how: str) -> None:
    module = CUTS["everything"].slice(build())
    buffer = io.BytesIO()
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is SliceableMultiheadAttention
    x = torch.randn(N, L, 5)
    assert torch.equal(twin(x, x, x)[0], module(x, x, x)[0])
    assert twin.in_proj_weight is not module.in_proj_weight


def test_copy_finds_its_own_way_back() -> None:
    module = build()
    twin = sliceable(module)
    make_plain(twin)
    assert type(twin) is nn.MultiheadAttention
    make_plain(module)
    assert vars(twin).keys() == vars(module).keys()


def test_back_after_a_cut_that_torch_can_run() -> None:
    module = build()
    cut = Cut((0, 2, 3), network=tuple(range(9))).slice(module)  # as many channels as the three heads have
    x = torch.randn(N, L, 9)
    expected = cut(x, x, x)
    make_plain(cut)
    assert type(cut) is nn.MultiheadAttention
    assert_same(cut(x, x, x), expected)
    assert_same(cut(x, x, x, need_weights=False), (expected[0], None))


@pytest.mark.parametrize("cut", ["heads", "head width", "network", "everything"])
def test_no_way_back_after_a_cut_that_torch_cannot_run(cut: str) -> None:
    module = CUTS[cut].slice(build())
    with pytest.raises(ValueError, match="cannot run these shapes"):
        make_plain(module)
    assert type(module) is SliceableMultiheadAttention


def test_narrower_heads_keep_the_scale_and_so_have_no_way_back() -> None:
    thin = replace(CUTS["head width"], network=tuple(range(8))).slice(build())
    assert thin.embed_dim == thin.num_heads * thin.head_dim == 8
    assert thin.scale == WIDTH**-0.5
    with pytest.raises(ValueError, match=r"scaled by 0\.5774"):
        make_plain(thin)


def test_subclasses_keep_their_forward() -> None:
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="and Own may have"):
        make_sliceable(Own(E, 2))
    with pytest.raises(TypeError, match="make_sliceable"):
        SliceableMultiheadAttention(E, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "give attn_mask"),
        ({"attn_mask": torch.zeros(1, S)}, r"attn_mask has shape \(1, 7\), expected \(5, 7\)"),
        ({"attn_mask": torch.zeros(N, L, S)}, r"\(12, 5, 7\)"),
        ({"attn_mask": torch.zeros(N, HEADS, L, S)}, r"attn_mask has shape \(3, 4, 5, 7\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int)}, "torch.int32"),
        ({"key_padding_mask": torch.zeros(1, S)}, r"key_padding_mask has shape \(1, 7\), expected \(3, 7\)"),
        ({"key_padding_mask": torch.zeros(N, L)}, r"key_padding_mask has shape \(3, 5\), expected \(3, 7\)"),
    ],
)
def test_misuse_is_told(options: dict[str, Any], message: str) -> None:
    """torch refuses these as well, where broadcasting would have made something of some of them."""
    module = build()
    given = inputs(module)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        module(*given, **options)
    with pytest.raises(ValueError, match=message):
        sliceable(module)(*given, **options)


def test_inputs_of_other_ranks_are_refused() -> None:
    module = sliceable(build())
    with pytest.raises(ValueError, match=r"got \(1, 3, 5, 12\), \(1, 3, 5, 12\), \(1, 3, 5, 12\)"):
        module(*[torch.randn(1, N, L, E)] * 3)
    with pytest.raises(ValueError, match="all be 3-D"):
        module(torch.randn(N, L, E), torch.randn(L, E), torch.randn(L, E))


# ---- inside torch's transformers -------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def replaced(model: nn.Module, change: Callable[[nn.MultiheadAttention], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, change(child))
    return model


@pytest.fixture
def no_fused_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("the fused kernel has run")

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fail)
        monkeypatch.setattr(torch, "_native_multi_head_attention", fail)

    return forbid


PADDING = torch.arange(L) >= torch.tensor([5, 2, 3]).unsqueeze(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cut", ["nothing", "heads", "head width"])
def test_encoders_with_their_fast_path(
    options: dict[str, Any], padding: bool, cut: str, no_fused_layer: Callable[[], None]
) -> None:
    """With padding and norm last, TransformerEncoder hands its layers nested tensors, and returns zeros as padding."""
    model = encoder(**options)
    dense, thin = replaced(model, CUTS[cut].zero), replaced(model, CUTS[cut].slice)
    x = torch.randn(N, L, E) if options.get("batch_first", True) else torch.randn(L, N, E)
    padded = {"src_key_padding_mask": PADDING} if padding else {}
    with torch.no_grad():
        expected = dense(x, **padded)
        no_fused_layer()
        torch.testing.assert_close(thin(x, **padded), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(thin(x), dense.train()(x), atol=1e-5, rtol=1e-4)
    if padding and not options:
        assert (expected[PADDING] == 0).all()  # the nested path was really taken


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("which", [0, 1])
def test_encoders_with_one_thin_layer(which: int) -> None:
    dense = encoder()
    thin = copy.deepcopy(dense)
    make_sliceable(thin.layers[which].self_attn)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(thin(x, src_key_padding_mask=PADDING), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("average", [False, True])
def test_nested_tensors(average: bool) -> None:
    module = build().eval()
    twin = sliceable(module)
    nested = torch.nested.as_nested_tensor([torch.randn(length, E) for length in (2, 5, 3)])
    with torch.no_grad():
        (expected, expected_weights), (got, weights) = (
            attention(nested, nested, nested, average_attn_weights=average) for attention in (module, twin)
        )
        for x, y in zip(got.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="without masks"):
            twin(nested, nested, nested, attn_mask=torch.zeros(5, 5))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("cut", ["nothing", "heads", "head width"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoders(cut: str, norm_first: bool) -> None:
    model = nn.Transformer(E, HEADS, 1, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    dense, thin = replaced(model, CUTS[cut].zero), replaced(model, CUTS[cut].slice)
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1:, 4:] = True
    for train in (True, False):
        for options in ({}, {"tgt_mask": causal, "tgt_is_causal": True}, {"memory_key_padding_mask": padding}):
            expected = dense.train(train)(source, target, **options)
            torch.testing.assert_close(thin.train(train)(source, target, **options), expected, atol=1e-5, rtol=1e-4)


# ---- exported --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, attention: nn.Module, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = memory if self.cross else x
        out: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return out


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("cut", ["nothing", "everything"])
def test_export_is_plain_aten(cross: bool, cut: str) -> None:
    kept = CUTS[cut]
    block = Block(kept.slice(build()), cross).eval()
    width = len(kept.outside)
    example = torch.randn(N, L, width), torch.randn(N, S, width)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, example, dynamic_shapes=({0: batch}, {0: batch} if cross else None))
    found = [name for name in operators(program) if "getitem" not in name]
    attend = ["unflatten.int", "transpose.int"] * 3 + [
        *("scaled_dot_product_attention.default", "permute.default", "flatten.using_ints", "linear.default"),
        "transpose.int",
    ]
    project = ["chunk.default", "split_with_sizes.default"] + ["linear.default"] * 3
    assert found == (project if cross else ["linear.default", "chunk.default"]) + attend
    splits = [node.args[1] for node in program.graph.nodes if node.target == torch.ops.aten.unflatten.int]
    assert splits == [-1, -1, -1]
    other = torch.randn(5, L, width), torch.randn(5 if cross else N, S, width)
    torch.testing.assert_close(program.module()(*other), block(*other))


def test_compiles_in_one_graph() -> None:
    block = Block(CUTS["everything"].slice(build()))
    given = torch.randn(N, L, 5), torch.randn(N, S, 5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), block(*given))


def test_a_cut_attention_is_a_leaf_for_fx_as_that_of_torch_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    net = Net().eval()
    make_sliceable(net.attention)
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    x = torch.randn(2, 5, 8)
    assert torch.equal(traced(x), net(x))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batched", [True, False])
def test_a_dropout_behind_draws_what_it_draws_behind_the_original(name: str, batched: bool) -> None:
    attention = build(name)
    given = inputs(attention, batched=batched)
    expected, got = (one(*given)[0] for one in (attention, sliceable(attention)))
    assert got.stride() == expected.stride()


class Weighing(nn.Module):
    """Attention as most write it: the weights are asked for, and nobody reads them unless `returns` says so."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(E, 4, batch_first=True), nn.Linear(E, 2)
        self.returns = returns

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x)
        return (self.head(out), weights) if self.returns else self.head(out)


def test_heads_whose_averaged_weights_nobody_reads_are_cut_exactly() -> None:
    net, x = Weighing(returns=False), torch.randn(N, L, E)
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for part in expected.attention.in_proj_weight.view(3, 4, -1):  # biases are zero from the start
            part[[0, 2]] = 0
    cut_channels(net, x, remove={"attention.in_proj_weight": [0, 2]})
    assert net.attention.in_proj_weight.shape == (3 * E // 2, E)
    torch.testing.assert_close(net(x), expected(x))


def test_heads_whose_averaged_weights_are_returned_are_no_exact_cut() -> None:
    with pytest.raises(ValueError, match="averages over channels"):
        cut_channels(Weighing(returns=True), torch.randn(N, L, E), remove={"attention.in_proj_weight": [0, 2]})


class Attending(nn.Module):
    """What TorchScript is made of: all arguments by name, as users write them."""

    def __init__(self, attention: nn.MultiheadAttention, *, need_weights: bool, average: bool) -> None:
        super().__init__()
        self.attention, self.need_weights, self.average = attention, need_weights, average

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.attention(
            query,
            key,
            value,
            key_padding_mask=padding,
            need_weights=self.need_weights,
            attn_mask=mask,
            average_attn_weights=self.average,
        )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("need_weights", "average"), [(True, True), (True, False), (False, True)])
def test_a_script_computes_what_the_module_does(name: str, need_weights: bool, average: bool) -> None:
    dense = build(name).eval()
    script = torch.jit.script(Attending(sliceable(dense), need_weights=need_weights, average=average))
    wide = Attending(dense, need_weights=need_weights, average=average)
    x, key, value = (
        torch.randn(N, L, width) if dense.batch_first else torch.randn(L, N, width)
        for width in (E, dense.kdim, dense.vdim)
    )
    padding = torch.zeros(N, L, dtype=torch.bool).index_fill_(1, torch.tensor([1]), True)
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    for given in [(x, x, x), (x, key, value)] if dense.kdim == dense.vdim == E else [(x, key, value)]:
        for masks in ((None, None), (padding, None), (None, later), (padding, later.repeat(N * dense.num_heads, 1, 1))):
            torch.testing.assert_close(script(*given, *masks), wide(*given, *masks))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cut", [name for name, one in CUTS.items() if len(one.outside) == E])
def test_an_encoder_layer_around_a_cut_attention_is_scripted(batch_first: bool, cut: str) -> None:
    kept = CUTS[cut]
    layer = nn.TransformerEncoderLayer(E, 4, 16, batch_first=batch_first).eval()
    layer.self_attn = kept.slice(build("batch first" if batch_first else "sequence first"))
    x, padding = torch.randn(N, N, E), torch.zeros(N, N, dtype=torch.bool).index_fill_(1, torch.tensor([1]), True)
    for model in (layer, nn.Sequential(layer)):
        script = torch.jit.script(model)
        with torch.no_grad():  # where torch's fast path would be taken
            torch.testing.assert_close(script(x), model(x))
    with torch.no_grad():
        script = torch.jit.script(layer)
        torch.testing.assert_close(script(x, None, padding), layer(x, None, padding))
        torch.testing.assert_close(script(x, torch.eye(N)), layer(x, torch.eye(N)))
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x), layer(x))
