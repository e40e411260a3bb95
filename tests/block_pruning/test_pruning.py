"""prune_blocks: which blocks leave, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.residual import attention, feed_forward, images, resnet, resnet_block, tokens, transformer

from lightning_compress.block_pruning import block_influence, prune_blocks, removed_blocks
from lightning_compress.block_pruning.plan import BlockError
from lightning_compress.block_pruning.prune import least_important, take_out
from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.stages.blocks import find_blocks


def test_named_blocks_leave() -> None:
    net = resnet()
    hand = copy.deepcopy(net)
    take_out(hand, images(), [resnet_block(1, 0), resnet_block(2, 1), resnet_block(2, 2)])
    prune_blocks(net, images(), remove=["stages.1.0", "stages.2.[12]"])
    assert list(removed_blocks(net)) == ["stages.1.0", "stages.2.1", "stages.2.2"]
    assert torch.equal(net(images(1)), hand(images(1)))


def test_the_blocks_that_change_least_leave_by_default() -> None:
    net = resnet()
    blocks = find_blocks(net, images()).blocks
    influence = block_influence(net, [images()], blocks)
    prune_blocks(net, images(), amount=0.5)
    gone = set(removed_blocks(net))
    assert len(gone) == 3  # all seven have the same multiply-accumulates
    assert max(influence[name] for name in gone) < min(influence[name] for name in influence.keys() - gone)


def test_scores_of_ones_own_and_blocks_among_which_to_choose() -> None:
    net, names = resnet(), ["stages.0.1", "stages.1.1", "stages.2.1"]
    prune_blocks(net, images(), amount=0.7, blocks=names, scores=dict(zip(names, (2.0, 3.0, 1.0), strict=True)))
    assert list(removed_blocks(net)) == ["stages.0.1", "stages.2.1"]


def test_the_influence_is_one_minus_the_cosine_of_what_a_block_reads_and_its_sum() -> None:
    net, x = resnet(), images()
    blocks = [resnet_block(0, 0), resnet_block(2, 1)]
    got = block_influence(net, [x, images(1)], blocks)
    expected: dict[str, list[torch.Tensor]] = {"stages.0.0": [], "stages.2.1": []}
    with torch.no_grad():
        for h in (x, images(1)):
            h = net.relu(net.bn(net.conv(h)))
            for i, stage in enumerate(net.stages):
                for j, block in enumerate(stage):
                    total = block.shortcut(h) + block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(h)))))
                    if (name := f"stages.{i}.{j}") in expected:
                        expected[name].append(1 - F.cosine_similarity(h.flatten(1), total.flatten(1)))
                    h = total.relu()
    assert got == pytest.approx({name: float(torch.cat(each).mean()) for name, each in expected.items()}, rel=1e-4)


def test_the_influence_of_tokens_is_a_mean_over_tokens() -> None:
    net, x = transformer(), tokens()
    got = block_influence(net, [x], [attention(0), feed_forward(0)])
    layer, h = net.layers[0], net.embed(x)
    n, t, d = h.shape
    q, k, v = layer.qkv(layer.norm1(h)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    total = h + layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
    assert got["layers.0.attention"] == pytest.approx(
        float((1 - F.cosine_similarity(h, total, dim=-1)).mean()), rel=1e-4
    )
    last = layer(h)
    assert got["layers.0.mlp"] == pytest.approx(float((1 - F.cosine_similarity(total, last, dim=-1)).mean()), rel=1e-4)


def test_a_large_block_is_passed_over() -> None:
    blocks = [resnet_block(0, 0, 50), resnet_block(0, 1, 10), resnet_block(0, 2, 40)]
    scores = {"stages.0.0": 1.0, "stages.0.1": 3.0, "stages.0.2": 2.0}
    assert [one.name for one in least_important(blocks, scores, 0.2)] == ["stages.0.1"]
    assert [one.name for one in least_important(blocks, scores, 0.6)] == ["stages.0.0", "stages.0.1"]
    assert least_important(blocks, scores, 0.0) == ()
    assert len(least_important(blocks, scores, 1.0)) == 3


def test_what_the_networks_own_code_computes_stays_and_is_told() -> None:
    net = transformer()
    with pytest.warns(
        UserWarning, match=r"left Transformer, and 576 of their multiply-accumulates stay: its code computes them"
    ):
        take_out(net, tokens(), [replace(attention(0), macs=6 * 8 * 32 + 2 * 6 * 6 * 8)])


def test_bad_input_is_refused_and_nothing_leaves() -> None:
    net, x = resnet(), images()
    with pytest.raises(TypeError, match=r"Got remove=None and amount=None"):
        prune_blocks(net, x)
    with pytest.raises(ValueError, match=r"no block 'stages\.9'"):
        prune_blocks(net, x, remove=["stages.9"])
    with pytest.raises(ValueError, match=r"amount must be a share .* got 1\.5"):
        prune_blocks(net, x, amount=1.5)
    with pytest.raises(ValueError, match=r"amount=0\.1 is less than the smallest block has .* 0\.143: raise it"):
        prune_blocks(net, x, amount=0.1)
    with pytest.raises(ValueError, match=r"scores has no number for stages\.0\.0"):
        prune_blocks(net, x, amount=0.5, scores={})
    with pytest.raises(ValueError, match=r"scores has no number for stages\.1\.1: expected one for each"):
        least_important([resnet_block(1, 1)], {"stages.1.1": float("nan")}, 0.5)
    with pytest.raises(BlockError, match=r"'stages\.1\.0' is not known, because its shortcut has layers"):
        block_influence(net, [x], [resnet_block(1, 0)])
    assert not stand_ins(net)
