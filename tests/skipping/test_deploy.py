"""What is deployed: the same answers, from blocks that do not run for samples that skip them; and its controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gated import KINDS, by_hand, gated_net
from support.small import CLASSES, FEATURES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_compress import SkippableBlocks
from lightning_compress.skipping.gates import SkipGates, gates_of

X = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(3))


def wrapped(kind: Any = "per_block") -> tuple[SkippableBlocks, SkipGates]:
    module = SmallModule(residual=True)
    module.net, gates = gated_net(kind)
    return SkippableBlocks(module, network="net", target=0.6, example_inputs=X[:4]), gates


def decisions(module: SkippableBlocks, x: Tensor) -> Tensor:
    gates = gates_of(module.net)
    assert gates is not None
    with gates.collecting() as found, torch.no_grad():
        module.eval()(x)
    runs = found.runs()
    assert runs is not None
    return runs.bool()


@pytest.mark.parametrize("kind", KINDS)
def test_the_deployed_network_answers_as_the_gated_one_and_runs_no_skipped_block(kind: Any) -> None:
    module, _ = wrapped(kind)
    skipping = module.deploy(min_gain=-100.0)
    seen: list[int] = []
    skipping.network.block1.conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    answers, runs = skipping.decisions(X)
    assert torch.equal(runs, decisions(module, X))
    torch.testing.assert_close(answers, module.eval()(X))
    torch.testing.assert_close(answers, by_hand(module.net, X, runs))
    for sample in (X[:1], X[7:8]):
        torch.testing.assert_close(skipping(sample), module(sample))
    assert gates_of(skipping.network) is None
    assert gates_of(module.net) is not None
    assert module.net is not skipping.network


def test_there_are_no_points_before_rates_are_known_and_then_three() -> None:
    module, gates = wrapped()
    assert module.operating_points() == []
    module.measure(plain())
    points = {one.name: one for one in module.operating_points()}
    assert list(points) == ["gates", "random gates", "static"]
    for one in points.values():
        assert one.network(X).shape == (len(X), CLASSES)
    runs = decisions(module, X)
    with points["gates"].answering():
        torch.testing.assert_close(module(X), points["gates"].network(X))
    with points["static"].answering():
        static = module(X)
        torch.testing.assert_close(static, points["static"].network(X))
    chosen = [block.name not in points["static"].network.never for block in gates.blocks]  # type: ignore[union-attr, operator]
    assert sum(chosen) <= 1
    torch.testing.assert_close(static, by_hand(module.net, X, torch.tensor([chosen]).expand(32, 2)))
    assert torch.equal(decisions(module, X), runs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_answers_as_its_network_which_runs_static_blocks_for_all(kind: Any) -> None:
    module, gates = wrapped(kind)
    module.measure(plain())
    gates.rates[0] = 0.99  # a gate that is static, and is not computed
    point = module.operating_points()[0]
    runs = point.network.decisions(X)[1]  # type: ignore[operator]
    assert bool(runs[:, 0].all())
    with point.answering():
        torch.testing.assert_close(module(X), by_hand(module.net, X, runs))
        torch.testing.assert_close(module(X), point.network(X))


def test_points_answer_in_the_modules_own_test_and_leave_the_rates() -> None:
    module, gates = wrapped()
    module.measure(plain())
    rates = gates.rates.clone()
    trainer = quiet_trainer()
    loader = DataLoader(dataset(1), batch_size=96)
    found = {}
    for point in module.operating_points():
        with point.answering():
            found[point.name] = trainer.test(module, loader, verbose=False)[0]["test_acc"]
            with torch.no_grad():
                answers = module(dataset(1).tensors[0]).argmax(1)
        if point.name != "random gates":
            expected = (answers == dataset(1).tensors[1]).float().mean()
            assert found[point.name] == pytest.approx(float(expected))
    assert torch.equal(gates.rates, rates)


def test_deploying_without_gates_or_with_broken_ones_is_refused() -> None:
    bare = SkippableBlocks(SmallModule(residual=True), network="net", target=0.6)
    with pytest.raises(ValueError, match="has no gates yet, as no fit has begun: pass example_inputs="):
        bare.deploy()
    module, gates = wrapped()
    with torch.no_grad():
        next(gates.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match=r"The gates have 1\.hidden\.weight with values that are no finite numbers"):
        module.deploy()


def test_a_dry_run_shows_the_blocks() -> None:
    module = SkippableBlocks(SmallModule(residual=True), network="net", target=0.6)
    outline = module.outline(X)
    assert outline is not None
    assert [row[1] for row in outline.rows] == ["block1", "block2"]
    assert "remain without any" in outline.note
