"""Changed inputs survive what is done with a network afterwards, or what loses them says so."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTrainingCallback
from lightning_compress.binary.inputs import binarize_inputs
from lightning_compress.core.structure import follow
from lightning_compress.quantization.input_grids import InputGrid, quantize_inputs

Change = Callable[["Net"], Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def on_grids(net: nn.Module) -> None:
    quantize_inputs(net, {name: InputGrid(0.25, 4, 3) for name in ("first", "second")})


CHANGES: dict[str, Change] = {
    "grids": on_grids,
    "signs": binarize_inputs,
    "xnor": lambda net: binarize_inputs(net, scale=True),
}


def inputs() -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def changed(change: str) -> tuple[Net, Tensor]:
    """A network with changed inputs, and its outputs, which are others than the plain network's."""
    net = Net().eval()
    CHANGES[change](net)
    with torch.no_grad():
        expected = net(inputs())
        assert (expected - Net()(inputs())).abs().max() > 0.05
    return net, expected


# ------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dense", ["before", "between"])
def test_a_network_compiled_after_a_dense_one_of_its_class_sees_changed_inputs(change: str, dense: str) -> None:
    def compiled(net: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = torch.compile(net, backend="eager")(inputs())
        return result

    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's default, which an earlier test may have changed
    if dense == "before":
        compiled(Net().eval())
    net, expected = changed(change)
    if dense == "between":
        compiled(Net().eval())
    assert torch.equal(compiled(net), expected)
    assert torch.equal(compiled(Net().eval()), Net().eval()(inputs()))


# ------------------------------------------------------------------ copies, traces, graphs


def pickled(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "trace": lambda net: torch.jit.trace(net, inputs()),
    "export": lambda net: torch.export.export(net, (inputs(),), strict=False).module(),
    "strict export": lambda net: torch.export.export(net, (inputs(),), strict=True).module(),
    "fx": torch.fx.symbolic_trace,
    "vmap": torch.func.vmap,
    "functional": lambda net: lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_of_a_network_computes_with_its_changed_inputs(way: str, change: str) -> None:
    net, expected = changed(change)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch.jit
        assert torch.allclose(WAYS[way](net)(inputs()), expected, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_a_script_is_refused_with_what_to_do(change: str) -> None:
    with pytest.raises(AttributeError, match=r"can't compile a layer whose input is changed.*use torch\.jit\.trace"):
        torch.jit.script(changed(change)[0])


def test_hooks_of_another_process_stay_when_this_one_adds_its_own(tmp_path: Path) -> None:
    nets = {change: changed(change)[0] for change in CHANGES}
    torch.save({"nets": nets, "x": inputs()}, tmp_path / "nets.pt")
    script = (
        "import torch\n"
        f"import {__name__}\n"
        f"saved = torch.load({str(tmp_path / 'nets.pt')!r}, weights_only=False)\n"
        "for name, net in saved['nets'].items():\n"
        "    before = net(saved['x'])\n"
        "    for layer in list(net.modules()) * 20:\n"
        "        layer.register_forward_pre_hook(lambda layer, args: None)\n"
        "        layer.register_forward_hook(lambda layer, args, output: None)\n"
        "    assert torch.equal(net(saved['x']), before), name\n"
    )
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, check=True)


# ------------------------------------------------------------------ loads that lose them


@pytest.mark.parametrize("change", CHANGES)
def test_a_load_that_leaves_inputs_real_says_so(change: str) -> None:
    net, expected = changed(change)
    lost = "first, second" if change == "grids" else "second"
    with pytest.warns(UserWarning, match=f"the inputs of {lost} stay real") as warned:
        Net().load_state_dict(net.state_dict())
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Net().load_state_dict(Net().state_dict())
        net.load_state_dict(net.state_dict())
        fresh = Net().eval()
        follow(fresh)
        fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(inputs()), expected)


class Following(SmallModule):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        follow(self)


def test_load_from_checkpoint_says_that_inputs_stay_real_and_how_they_come_along(tmp_path: Path) -> None:
    module = SmallModule()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTrainingCallback(4, 3)], max_epochs=1)
    trainer.fit(module, shuffled())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.warns(UserWarning, match=r"inputs of net\.conv, .*net\.head stay real.*on_load_checkpoint"):
        SmallModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="stay real"):
        quiet_trainer().test(SmallModule(), plain(), ckpt_path=tmp_path / "it.ckpt", verbose=False, weights_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stay real")
        loaded = Following.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    x = next(iter(plain()))[0]
    assert torch.equal(loaded.eval()(x), module.eval()(x))
