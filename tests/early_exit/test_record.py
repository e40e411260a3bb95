"""Exit heads in state dicts, checkpoints and compressed files, and in classes that know nothing of them."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer
from torch import nn

from lightning_compress import EarlyExitHeads, load_compressed, save_compressed
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.early_exit.heads import heads_of
from lightning_compress.early_exit.rules import ExitRule

X = torch.zeros(2, FEATURES)
EXITS = ["net.norm", "net.hidden"]
RULE = ExitRule(
    rule="confidence",
    thresholds=(0.9, math.inf),
    temperatures=(1.5, 1.0, 2.0),
    frontier=((1.0, (0.5, 0.25)), (2.0, (math.inf, math.inf))),
    stages=(1.0, 1.0, 1.0),
    heads=(0.5, 0.5),
)


def with_exits(**options: Any) -> EarlyExitHeads:
    torch.manual_seed(3)
    wrapped = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES, example_inputs=X, **options)
    heads = heads_of(wrapped)
    assert heads is not None
    heads.rule = RULE
    return wrapped


def assert_same(model: nn.Module, wrapped: nn.Module) -> None:
    heads, expected = heads_of(model), heads_of(wrapped)
    assert heads is not None
    assert expected is not None
    assert heads.layers == expected.layers
    assert heads.rule == RULE
    states = (model.state_dict(), wrapped.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_the_keys_of_the_modules_own_tensors_stay() -> None:
    names = list(with_exits().state_dict())
    assert [name for name in names if not name.startswith("exit_heads.")] == list(SmallModule().state_dict())


def test_a_plain_class_loads_the_rest_strictly_and_is_told_what_it_leaves() -> None:
    wrapped, module = with_exits(), SmallModule()
    with pytest.warns(UserWarning, match="everything but the exit heads at 'exit_heads'"):
        module.load_state_dict(wrapped.state_dict())
    assert all(torch.equal(one, wrapped.state_dict()[name]) for name, one in module.state_dict().items())
    broken = wrapped.state_dict()
    del broken["net.head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.head\.bias"):
        SmallModule().load_state_dict(broken)


def test_load_from_checkpoint_of_the_own_class_leaves_the_heads(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(with_exits(), plain(0))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="everything but the exit heads"):
        SmallModule.load_from_checkpoint(tmp_path / "last.ckpt")


def test_a_part_of_the_network_carries_heads_of_its_own() -> None:
    class Around(SmallModule):
        pass

    torch.manual_seed(3)
    wrapped = EarlyExitHeads(Around(), ["norm"], num_classes=CLASSES, network="net", example_inputs=X)
    assert next(name for name in wrapped.state_dict() if "exit" in name) == "net.exit_heads.1.mix"
    plain_module = Around()
    with pytest.warns(UserWarning, match=r"the exit heads at 'net\.exit_heads'"):
        plain_module.load_state_dict(wrapped.state_dict())


@pytest.mark.parametrize("coder", ["ans", "none"])
def test_a_compressed_file_gives_the_plain_class_its_heads(coder: Any, tmp_path: Path) -> None:
    wrapped = with_exits()
    save_compressed(wrapped, tmp_path / "small.lcz", coder=coder)
    model = load_compressed(tmp_path / "small.lcz", SmallModule())
    assert_same(model, wrapped)
    again = EarlyExitHeads(model, None, num_classes=CLASSES)  # type: ignore[type-var]
    assert_same(again, wrapped)


def test_a_checkpoint_of_weights_gives_them_to_a_wrapper_with_the_same_exits(tmp_path: Path) -> None:
    wrapped = with_exits()
    torch.save(wrapped.state_dict(), tmp_path / "weights.pt")
    fresh = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES, example_inputs=X)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same(fresh, wrapped)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_keep_heads_and_rule(copied: Any) -> None:
    assert_same(copied(with_exits()), with_exits())


def test_exits_at_other_layers_are_refused_and_change_nothing() -> None:
    wrapped = with_exits()
    other = EarlyExitHeads(SmallModule(), ["net.conv"], num_classes=CLASSES, example_inputs=X)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RecordError, match=r"with exits at net\.norm, net\.hidden, and this one has them at net\.c"):
        other.load_state_dict(wrapped.state_dict())
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())
    with pytest.raises(ValueError, match=r"has exits at net\.norm, net\.hidden already, and exits= says net\.conv"):
        EarlyExitHeads(with_exits(), ["net.conv"], num_classes=CLASSES)


def test_heads_of_the_users_own_are_not_rebuilt(tmp_path: Path) -> None:
    def head(features: torch.Tensor, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(features[0].numel(), classes))

    wrapped = with_exits(head=head)
    save_compressed(wrapped, tmp_path / "small.lcz")
    with pytest.raises(ValueError, match="a module of your own, which no file can rebuild"):
        load_compressed(tmp_path / "small.lcz", SmallModule())
    fresh = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES, example_inputs=X, head=head)
    assert_same(load_compressed(tmp_path / "small.lcz", fresh), wrapped)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", "net.norm"),
        ("layers", []),
        ("layers", ["net.norm", "net.nothing"]),
        ("heads", [None]),
        ("heads", [["map", [6, 12]], ["vector", [-1]]]),
        ("heads", [["round", [6, 12]], ["vector", [16]]]),
        ("num_classes", "many"),
        ("rule", {"rule": "luck"}),
        ("rule", 7),
    ],
)
def test_a_record_that_nothing_writes_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    wrapped = with_exits()
    save_compressed(wrapped, tmp_path / "small.lcz")
    state = wrapped.state_dict()
    state._metadata[""][KEY]["exits"][field] = value  # type: ignore[attr-defined]
    from lightning_compress.core.structure import following

    module = SmallModule()
    with pytest.raises(RecordError), following(module):
        module.load_state_dict(state)
    assert heads_of(module) is None


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("exits", [EXITS, 2])
def test_a_checkpoint_brings_heads_that_nothing_else_could_make(verb: str, exits: Any, tmp_path: Path) -> None:
    wrapped, trainer = with_exits(), quiet_trainer(max_epochs=1)
    trainer.fit(wrapped, plain(0))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = EarlyExitHeads(SmallModule(), exits, num_classes=CLASSES)  # another process, without example inputs
    said = {} if verb == "predict" else {"verbose": False}
    found = getattr(quiet_trainer(), verb)(fresh, plain(1), ckpt_path=tmp_path / "last.ckpt", weights_only=True, **said)
    assert_same(fresh, wrapped)
    expected = getattr(quiet_trainer(), verb)(wrapped, plain(1), **said)
    if verb != "predict":
        assert found == expected
        assert any(name.startswith("exit1/") for name in found[0])
    assert torch.equal(fresh.deploy(example_inputs=X)(X, exit=1)[0], wrapped.deploy()(X, exit=1)[0])
    quiet_trainer(max_epochs=1).fit(fresh, plain(0))


def test_a_checkpoint_with_heads_at_other_layers_than_named_is_refused() -> None:
    fresh = EarlyExitHeads(SmallModule(), ["net.conv"], num_classes=CLASSES)
    with pytest.raises(RecordError, match=r"with exits at net\.norm, net\.hidden, and this one has them at net\.conv"):
        fresh.load_state_dict(with_exits().state_dict())
    assert heads_of(fresh) is None


def test_exits_that_have_no_heads_yet_are_said() -> None:
    with pytest.warns(UserWarning, match="have no heads yet, as no fit has begun"):
        quiet_trainer().validate(EarlyExitHeads(SmallModule(), 2, num_classes=CLASSES), plain(1), verbose=False)
