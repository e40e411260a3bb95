"""Low rank in a fit: what is replaced and when, what resumes, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.compare import differences
from support.jobs import fit
from support.small import FEATURES, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import LowRankCallback, load_compressed, lower_rank, save_compressed
from lightning_compress.low_rank import merge
from lightning_compress.replacement.swap import replaced


def small(seed: int = 0) -> SmallModule:
    torch.manual_seed(seed)
    return SmallModule()


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_with_nothing_given_half_of_the_parameters_stay_and_the_factors_train() -> None:
    module = small()
    before = parameters(module)
    callback = LowRankCallback()
    fit(None, module=module, callbacks=(callback,), max_epochs=1)
    assert 0.4 * before < parameters(module) <= 0.5 * before
    assert callback.report is not None
    assert set(callback.report.replaced) == {"net.hidden"}
    assert callback.report.left["net.head"] == "the budget is met without it"


def test_it_begins_with_the_factors_of_the_function_on_the_first_batches() -> None:
    module, other = small(), small()
    begun: dict[str, Any] = {}

    class Notes(LowRankCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            begun.update(copy.deepcopy(pl_module.state_dict()))

    fit(None, module=module, callbacks=(Notes(rank=4, n_batches=3),), max_epochs=1)
    seed_everything(1, verbose=False)  # as `fit` does
    batches = [batch[0] for batch, _ in zip(shuffled(), range(3), strict=False)]
    lower_rank(other, torch.zeros(2, FEATURES), rank=4, batches=batches)
    assert not differences(begun, dict(other.state_dict()))


@pytest.mark.parametrize("data", [None, "none"])
def test_data_and_plain_svd_begin_with_other_factors(data: Any) -> None:
    found = []
    for n in (2, 4):
        callback = LowRankCallback(rank=3, data=data, n_batches=n)
        plan = callback.plan(small(), torch.zeros(2, FEATURES), [batch[0] for batch, _ in zip(plain(), range(n))])  # noqa: B905
        found.append(plan.replacements["net.hidden"].values)
    assert bool(differences(found[0], found[1])) == (data is None)


def test_the_file_of_a_fit_loads_into_the_dense_class(tmp_path: Path) -> None:
    module = small()
    fit(None, module=module, callbacks=(LowRankCallback(budget=0.4),), max_epochs=1)
    save_compressed(module, tmp_path / "module.lcz")
    fresh = load_compressed(tmp_path / "module.lcz", small(1))
    x = torch.randn(5, FEATURES)
    torch.testing.assert_close(fresh.eval()(x), module.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(merge(fresh)(x), module(x))
    plain_class = small(2)
    plain_class.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(plain_class.eval()(x), module(x))


def test_an_average_of_the_weights_has_the_same_layers() -> None:
    module = small()
    average = EMAWeightAveraging(decay=0.5)
    fit(None, module=module, callbacks=(average, LowRankCallback(rank={"net.hidden": 4})), max_epochs=1)
    assert module.net.hidden.first.weight.shape == (4, 72)  # the average's, which the fit ends with
    assert parameters(module) < parameters(small())


def test_a_network_that_is_replaced_already_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module = small()
    lower_rank(module, torch.zeros(2, FEATURES), rank={"net.hidden": 3})
    fit(None, module=module, callbacks=(LowRankCallback(rank={"net.hidden": 7}),), max_epochs=1)
    assert module.net.hidden.first.out_features == 3
    assert "are replaced already" in caplog.text


def test_the_outline_shows_every_layer_and_changes_nothing() -> None:
    module = small()
    before = copy.deepcopy(module.state_dict())
    outline = LowRankCallback().outline(module, lambda: torch.randn(8, FEATURES))
    assert outline is not None
    rows = {row[0]: row[1:] for row in outline.rows}
    assert rows["net.hidden"][0] == "linear"
    assert rows["net.head"][0] == "stays: the budget is met without it"
    assert not differences(before, module.state_dict())


def test_a_frozen_network_or_an_optimizer_that_exists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low rank could replace: net.conv, net.hidden, net.head: it is frozen"):
        fit(None, module=small().requires_grad_(False), callbacks=(LowRankCallback(),), max_epochs=1)

    class Early(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.made

    module = Early()
    with pytest.raises(ValueError, match=r"SGD was made before LowRankCallback replaced 'net.hidden'"):
        fit(None, module=module, callbacks=(LowRankCallback(),), max_epochs=1)
    assert not replaced(module)


def test_a_resume_without_records_is_refused(tmp_path: Path) -> None:
    fit(None, module=small(), folder=tmp_path, max_epochs=1)
    trainer = quiet_trainer(callbacks=[LowRankCallback()], max_epochs=2)
    with pytest.raises(ValueError, match="is of a fit without LowRankCallback"):
        trainer.fit(small(), shuffled(), plain(), ckpt_path=next(tmp_path.glob("*.ckpt")), weights_only=True)


def test_a_submodule_that_does_not_run_with_batches_is_refused_with_what_to_do() -> None:
    inputs = torch.zeros(2, 3, 3)
    callback = LowRankCallback(rank=2, network="net.head", example_inputs=inputs)
    with pytest.raises(ValueError, match=r"calls network='net.head' with training batches.* choose layers by target="):
        fit(None, module=small(), callbacks=(callback,), max_epochs=1)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank is a whole number, 1 or more"),
    ({"rank": 2, "budget": 0.5}, "Pass one of rank, energy and budget"),
    ({"energy": 2.0}, "energy is the share of the variance"),
    ({"budget": -0.1}, "budget is the share of the cost"),
    ({"cost": "bytes"}, "cost must be one of parameters, macs, latency; got 'bytes'"),
    ({"method": "svd"}, "method must be one of"),
    ({"data": "training"}, 'data must be None, for training batches, or "none", for plain SVD; got'),
    ({"n_batches": 0}, "n_batches must be a whole number, 1 or more; got 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankCallback(**options)


def test_a_budget_that_cannot_be_met_leaves_the_module_as_it_was() -> None:
    module = small()
    before: dict[str, Tensor] = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"the least possible is 0\.1"):
        fit(None, module=module, callbacks=(LowRankCallback(budget=0.05),), max_epochs=1)
    assert not replaced(module)
    assert not differences(before, module.state_dict())
