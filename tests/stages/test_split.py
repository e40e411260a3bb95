"""Networks that are cut at layers compute what they computed, for the samples that stay."""

from __future__ import annotations

import pytest
import torch
from support.reference import randomize, to_double
from support.zoo import ZOO
from torch import Tensor, nn

from lightning_compress.core.example_inputs import call
from lightning_compress.stages.extract import extract, rows_of
from lightning_compress.stages.split import Examples, axes_of, differ, executor, split
from lightning_compress.stages.trace import SplitError, trace

ZOO_PART = {  # windows and heads that are folded into the batch, masks, tables of positions, keys that are shared
    "swin": ["swin.encoder.layers.0.blocks.0.attention.k_proj", "swin.encoder.layers.1.blocks.0.layernorm_after"],
    "shufflenet v2": ["one.4", "two.3"],
    "gpt2": ["transformer.h.0.mlp.act", "transformer.h.1.attn.c_proj"],
    "llama": ["model.layers.0.mlp.up_proj", "model.layers.1.post_attention_layernorm"],
    "bert": ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.attention.self.query"],
}


@pytest.mark.parametrize("name", ZOO_PART)
def test_networks_of_all_kinds_split_inside_blocks(name: str) -> None:
    torch.manual_seed(0)
    network, inputs = randomize(ZOO[name].make(), seed=1).double().eval(), to_double(ZOO[name].inputs())
    if missing := set(ZOO_PART[name]) - set(dict(network.named_modules())):
        pytest.skip(f"this version of transformers has no {', '.join(missing)}")
    stages = split(network, ZOO_PART[name], inputs)
    assert len(stages.crossing[1]) > 1
    examples = Examples(network, ZOO_PART[name], axes_of(network, inputs, None), None)
    with torch.no_grad():
        leaves = [leaf for leaf in examples.of([0, 1, 2, 3]) if isinstance(leaf, Tensor)]
        stay = {1: torch.tensor([3, 1, 0]), 2: torch.tensor([2, 1])}  # in another order, too
        answer = stages.run(executor(network, stages), leaves, [1, 2], lambda cut, _: stay[cut])
        keywords = dict(zip(inputs, leaves, strict=True)) if isinstance(inputs, dict) else None
        found = call(network, keywords or leaves[0])["logits" if keywords or name == "swin" else slice(None)]
    assert answer is not None
    assert differ([answer], [found[[0, 1]]]) is None


class Folded(nn.Module):
    """The heads of all samples stand in one dimension, and a size is computed from their number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).view(x.shape[0] * 2, 3).relu()
        return self.down(heads.view(x.shape[0], 6))


def test_a_part_of_a_graph_runs_for_fewer_samples() -> None:
    network, x = Folded().eval(), torch.randn(4, 6)
    graph = trace(network, axes_of(network, x, None), ["up"], None)
    start = graph.ends["up"][0]
    after = graph.nodes[start.position :]
    given = {start.node: rows_of(graph, start.node, "the end of up")}
    part = extract(graph, after, given, graph.answer, "the end of up")
    tensors = dict(network.named_parameters())
    got = part.module(network.up(x[:3]), *(tensors[name] for name in part.names))
    assert part.names == ("down.weight", "down.bias")
    assert torch.equal(got, network(x[:3]))


def test_what_mixes_samples_is_named() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Flatten(0))
    graph = trace(network, axes_of(network, torch.randn(2, 3), None), ["0"], None)
    flat = rows_of(graph, graph.answer, "the output")
    assert flat is not None
    assert flat.each == 3
    product = nn.Sequential(nn.Linear(3, 3))
    product.forward = lambda x: nn.functional.linear(x, x)  # type: ignore[method-assign]
    graph = trace(product, axes_of(product, torch.randn(2, 3), None), [], None)
    with pytest.raises(SplitError, match="crosses the output, mixes the samples"):
        rows_of(graph, graph.answer, "the output")
