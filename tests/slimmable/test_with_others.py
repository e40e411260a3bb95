"""A switched network under torch.compile, torch.export and torch.func, with masks, and with exit heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, fx, nn
from torchmetrics import Accuracy

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.answering import answering_now
from lightning_compress.early_exit.heads import heads_of, make_heads, reading
from lightning_compress.early_exit.record import give_heads
from lightning_compress.slimmable.network import extract
from lightning_compress.slimmable.norms import give_norms
from lightning_compress.slimmable.switch import set_width, thin_of


def slimmable() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    ).double()
    inputs = torch.randn(4, 3, 6, 6, dtype=torch.double)
    give_norms(network, channel_groups(network, inputs), [0.25, 0.5])
    return network.eval(), inputs


@pytest.mark.parametrize("in_place", [False, True])
def test_torch_compile_compiles_each_width(in_place: bool) -> None:
    network, inputs = slimmable()
    expected = {}
    for width in (0.25, 0.5, 1.0):
        set_width(network, width)
        expected[width] = network(inputs).detach()
    calls: list[int] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        calls.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled: Any = network
    if in_place:
        network.compile(backend=backend)
    else:
        compiled = torch.compile(network, backend=backend)
    for width in (1.0, 0.5, 0.25, 1.0, 0.5):
        set_width(network, width)
        assert torch.equal(compiled(inputs), expected[width])
    graphs = [n for n in calls if n]  # each has all layers; one may serve two widths, with sizes as its inputs
    assert set(graphs) == {calls[0]}
    assert 2 <= len(graphs) <= 3
    with torch.no_grad():
        network[0].weight.mul_(2)
    assert torch.equal(compiled(inputs), copy.deepcopy(network)(inputs))


def test_programs_are_made_of_extracted_networks() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    for make in (torch.export.export, torch.jit.trace):
        with pytest.raises(RuntimeError, match=r"can't take Sequential while .* width 0.5: .*extract"):
            make(network, (inputs,))
    with pytest.raises(ValueError, match=r"while it is switched to width 0.5"):
        channel_groups(network, inputs)
    program = torch.export.export(extract(network, 0.5, inputs), (inputs,))
    torch.testing.assert_close(program.module()(inputs), network(inputs))


def test_gradients_of_torch_func() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    network(inputs).square().sum().backward()
    parameters = {name: one.detach() for name, one in network.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, given, (x,)).square().sum()

    whole = torch.func.grad(loss)(parameters, inputs)
    each = torch.vmap(lambda x: torch.func.grad(loss)(parameters, x[None]))(inputs)
    for name, one in network.named_parameters():
        expected = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(whole[name], expected)
        torch.testing.assert_close(each[name].sum(0), expected)
    before = network(inputs)
    assert torch.equal(network(inputs), before)


def test_checkpointed_activations_and_inference_mode() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    with torch.inference_mode():
        expected = network(inputs)
    network(inputs).square().sum().backward()
    gradients = [None if one.grad is None else one.grad.clone() for one in network.parameters()]
    network.zero_grad()
    found = torch.utils.checkpoint.checkpoint(network, inputs, use_reentrant=False)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    for one, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(one.grad, gradient)


def test_masks_of_the_full_network_hold_at_every_width() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    before = network(inputs)
    mask = network[3].weight.abs() > network[3].weight.abs().median()
    with torch.no_grad():
        network[3].weight.mul_(mask)
    assert not torch.equal(network(inputs), before)
    assert torch.equal(answering_now(network)[3].weight != 0, mask[:6, :4])


def test_exit_heads_are_as_thin_as_their_layers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    ).eval()
    inputs = torch.randn(4, 3, 6, 6)
    features = {"2": network[:3](inputs)}
    give_heads(network, make_heads(["2"], features, network(inputs), num_classes=4))
    give_norms(network, channel_groups(network, inputs), [0.5])

    def answers(one: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        heads = heads_of(one)
        assert heads is not None
        with reading(one, heads.layers, lambda layer, x: found.append(heads.by_layer()[layer](x))):
            output = network(inputs)
        return [*found, output]

    full = answers(network)
    set_width(network, 0.5)
    thin = answers(answering_now(network))
    cut = extract(network, 0.5, inputs)
    assert heads_of(cut) is not None
    set_width(network, 1.0)
    network = cut
    for got, expected in zip(thin, answers(cut), strict=True):
        torch.testing.assert_close(got, expected)
    assert [one.shape for one in full] == [one.shape for one in thin]
    assert not torch.equal(full[0], thin[0])


def test_training_reaches_every_parameter_that_a_width_has() -> None:
    network, inputs = slimmable()
    network.train()
    set_width(network, 0.25)
    network(inputs).square().sum().backward()
    weight = network[3].weight.grad
    assert bool((weight[:3, :2] != 0).all())
    assert not weight[3:].any()
    assert not weight[:, 2:].any()
    thin = thin_of(network, 0.25)
    before = thin.module[3].weight.detach().clone()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    network.eval()(inputs)
    torch.testing.assert_close(thin.module[3].weight, before - 0.1 * weight[:3, :2])


def test_a_lightning_module_keeps_its_trainer_and_metrics() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
            self.accuracy = Accuracy("multiclass", num_classes=3)
            self.generator = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Module()
    give_norms(module, channel_groups(module, torch.randn(2, 4)), [0.5])
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer = trainer
    thin: Any = thin_of(module, 0.5).module
    assert thin.trainer is module.trainer
    assert thin.accuracy is module.accuracy
    assert thin.generator is module.generator
    assert thin.net[0].out_features == 8
