"""A network with exits answers as the network and its heads do one by one, and computes no more than that needs."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.rules import ExitRule, score


class Residual(nn.Module):
    """Two blocks; an exit within the second one has two tensors that cross."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.a = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.c = nn.Conv2d(6, 8, 3, 2, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(self.a(x))
        y += x
        x = F.relu(y, inplace=True)
        y = self.d(F.relu_(self.c(x)))
        y += self.shortcut(x)
        return self.fc(F.relu(y).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(4)])
        self.fc = nn.Linear(19, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(F.relu(layer(torch.cat(found, 1))))
        return self.fc(torch.cat(found, 1).mean((2, 3)))


class Tokens(nn.Module):
    """A class token, a table of positions, attention whose heads are folded into the batch, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 7, 8))
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        x = x + self.position[:, : x.shape[1]]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, causal)
        return {"hidden": x, "scores": self.fc(x[:, 0] + x[:, -1])}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mix, self.up = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        weights = (q @ k.transpose(1, 2)).masked_fill(~mask, -math.inf).softmax(-1)
        y = (weights @ v).view(batch, 2, length, 4).transpose(1, 2).reshape(batch, length, 8)
        x = x + self.mix(y)
        return x + self.up(F.gelu(x))


class Recurrent(nn.Module):
    """The batch is the second dimension of what crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.fc = nn.Linear(5, 6), nn.GRU(6, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        time_first = self.first(x).transpose(0, 1).contiguous()
        pooled = self.norm(time_first.mean(0))
        return self.fc(self.rnn(time_first)[0][-1] + pooled)


class Views(nn.Module):
    """Views of one tensor cross, one is written to later; an activation could overwrite what a view still shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 6), nn.Linear(3, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        left, whole = y[:, :3], y.view(-1, 6)
        z = self.b(left)
        y += 1
        z = z + y.relu()[:, 3:]
        left += z  # seen in `whole`
        return self.fc(torch.cat([whole, z], 1))


class Asks(nn.Module):
    """Data decide what runs, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if bool(x.isnan().any()):
            raise ValueError("not a number")
        return self.fc(self.b(x.relu()))


def pooled(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


class LastToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, -1])


class Case:
    """A network with exits, and what it must answer, computed with forward hooks of the network, sample by sample."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        network, heads, shape, output = {
            "residual": (Residual, {"a": pooled(6), "c": pooled(8)}, (3, 6, 6), None),
            "in place": (Residual, {"stem.1": pooled(6), "d": pooled(8)}, (3, 6, 6), None),
            "dense": (Dense, {"layers.0": pooled(4), "layers.2": pooled(4)}, (3, 6, 6), None),
            "tokens": (Tokens, {"blocks.0.norm": LastToken(), "blocks.1.mix": LastToken()}, (5, 5), "scores"),
            "recurrent": (Recurrent, {"first": LastTime(), "norm": nn.Linear(6, 4)}, (5, 5), None),
            "views": (Views, {"a": nn.Linear(6, 4), "b": nn.Linear(3, 4)}, (5,), None),
            "asks": (Asks, {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}, (5,), None),
        }[name]
        self.network = network().to(dtype).eval()
        self.heads: Mapping[str, nn.Module] = {name: head.to(dtype).eval() for name, head in heads.items()}
        self.output = output
        self.inputs = torch.randn(12, *shape, dtype=dtype)
        with torch.no_grad():  # statistics of batch norms that do something
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 1.5)
            for head, answer in zip(self.heads.values(), self.answers(self.inputs), strict=False):
                last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
                last.bias -= answer.mean(0)  # so that samples are predicted different classes

    def answers(self, x: Tensor) -> list[Tensor]:
        """The answers of all exits and of the network, for a batch as it is."""
        found: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: found.update({name: output.clone()})
            )
            for name in self.heads
        ]
        with torch.no_grad():
            last = self.network(x)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            exits = [head(found[name]) for name, head in self.heads.items()]
        return [*exits, last[self.output] if self.output else last]

    def rule(self, kind: Any = "margin", closed: tuple[int, ...] = ()) -> ExitRule:
        """Thresholds at which about a third of the samples leave at each of the two exits."""
        thresholds = []
        for k in range(2):
            if kind == "patience":
                thresholds.append(float(k + 1) if k else 2.0)
                continue
            scores = score(self.answers(self.inputs)[k], kind, 1.0 + k)
            thresholds.append(float(scores.quantile(0.6)))
        thresholds = [math.inf if k in closed else one for k, one in enumerate(thresholds)]
        return ExitRule(rule=kind, thresholds=tuple(thresholds), temperatures=(1.0, 2.0, 1.0))

    def early(self, rule: ExitRule | None, **options: Any) -> EarlyExitNetwork:
        early = EarlyExitNetwork(self.network, self.heads, rule, self.inputs[:3], output=self.output, **options)
        return early.eval()

    def one_by_one(self, rule: ExitRule, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample alone leaves at the first exit that is sure: written without the package's rules for a batch."""
        outputs, index = [], []
        for i in range(len(inputs)):
            answers = self.answers(inputs[i : i + 1])
            predicted: list[int] = []
            for k, answer in enumerate(answers):
                if k == 2:
                    break
                if rule.thresholds[k] == math.inf:
                    continue
                predicted.append(int(answer.argmax()))
                if rule.rule == "patience":
                    run = next((n for n, one in enumerate(reversed(predicted)) if one != predicted[-1]), len(predicted))
                    sure = float(run)
                else:
                    p = (answer.float() / rule.temperatures[k]).softmax(1)[0].sort(descending=True).values
                    sure = float(p[0] - p[1]) if rule.rule == "margin" else float(p[0])
                if sure >= rule.thresholds[k]:
                    break
            outputs.append(answers[k])
            index.append(k)
        return torch.cat(outputs), torch.tensor(index)


class LastTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, -1])


SPLIT = ["residual", "in place", "dense", "tokens", "recurrent", "views"]


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-9) -> None:
    assert got[1].tolist() == expected[1].tolist()
    assert float((got[0] - expected[0]).abs().max()) <= tolerance * float(expected[0].abs().max())


@contextmanager
def counted(early: EarlyExitNetwork) -> Iterator[list[tuple[str, int]]]:
    """The convolutions, linear layers and heads that run, with the number of samples: by the operators themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[tuple[str, int]] = []
    names = {id(one): name.removesuffix(".weight") for name, one in early.named_parameters()}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                found.append((names[id(args[1])], args[0].shape[0]))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        yield found


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "margin") for name in (*SPLIT, "asks"))]
    + [(name, kind) for name in ("residual", "asks") for kind in ("confidence", "patience")],
)
def test_a_batch_is_answered_as_its_samples_one_by_one(name: str, kind: str) -> None:
    case = Case(name)
    rule = case.rule(kind)
    early = case.early(rule)
    assert early.whole_batch == (name == "asks")
    expected = case.one_by_one(rule, case.inputs)
    assert len(expected[1].unique()) > 1
    with torch.no_grad():
        same(early(case.inputs), expected)
        same(early(case.inputs[:1]), case.one_by_one(rule, case.inputs[:1]))
        output, index = early(case.inputs[:0])
    assert (output.shape, index.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("name", SPLIT)
def test_more_tensors_than_one_cross_and_whole_batches_answer_alike(name: str) -> None:
    case = Case(name)
    early = case.early(case.rule())
    assert early._stages is not None
    assert max(map(len, early._stages.crossing)) >= 2
    whole = case.early(case.rule(), whole_batch=True)
    with torch.no_grad():
        same(whole(case.inputs), early(case.inputs))


def test_layers_after_an_exit_run_with_the_samples_that_stay() -> None:
    case = Case("residual")
    rule = case.rule()
    early, (_, index) = case.early(rule), case.one_by_one(rule, case.inputs)
    stay = int((index > 0).sum()), int((index > 1).sum())
    assert 0 < stay[1] < stay[0] < 12
    with counted(early) as found:
        early(case.inputs)
    counts = {"stem.0": 12, "a.0": 12, "b.0": stay[0], "c": stay[0], "d": stay[1], "shortcut": stay[1]}
    assert dict(found) == {f"network.{name}": n for name, n in counts.items()}
    assert len(found) == len(counts)


def test_nothing_runs_after_the_last_sample_has_left() -> None:
    case = Case("residual")
    everybody = ExitRule(rule="margin", thresholds=(math.inf, 0.0), temperatures=(1.0, 1.0, 1.0))
    for early in (case.early(everybody), case.early(everybody, whole_batch=True)):
        with counted(early) as found:
            assert early(case.inputs)[1].tolist() == [1] * 12
        assert [name for name, _ in found] == [f"network.{name}" for name in ("stem.0", "a.0", "b.0", "c")]


def test_a_closed_exit_costs_nothing() -> None:
    """Its head is not run, nothing is gathered there, and its stage is one with the next."""
    case = Case("residual")
    early = case.early(case.rule(closed=(0,)))
    calls: list[int] = []
    for head in early.heads:
        head.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    with torch.no_grad():
        got = early(case.inputs)
    assert calls == [12]
    same(got, case.one_by_one(case.rule(closed=(0,)), case.inputs))
    assert early._stages is not None
    assert {(0, 2, False), (2, 3, True)} <= set(early._stages._stages)


@pytest.mark.parametrize("name", ["residual", "tokens", "asks"])
def test_one_exit_for_all(name: str) -> None:
    case = Case(name)
    early = case.early(None)
    for k, expected in enumerate(case.answers(case.inputs)):
        with torch.no_grad():
            same(early(case.inputs, exit=k + 1), (expected, torch.full((12,), k)))
            static = early.static(k + 1)
            assert torch.allclose(static(case.inputs), expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"exit=4: pass a number from 1 to 3"):
        early(case.inputs, exit=4)
    with pytest.raises(ValueError, match="no thresholds yet"):
        early(case.inputs)


def test_the_static_network_of_an_exit_is_smaller_and_shares_its_weights() -> None:
    case = Case("residual")
    static = case.early(None).static(1)
    mine = {id(one) for one in static.parameters()}
    needed = [*case.network.stem.parameters(), *case.network.a.parameters(), *case.heads["a"].parameters()]
    assert mine == {id(one) for one in needed}


def test_the_static_network_of_an_exit_is_an_onnx_file(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from lightning_compress.deploy import capture, save_onnx

    case = Case("residual", torch.float32)
    static = case.early(None).static(2)
    save_onnx(capture(static, case.inputs[:2]), tmp_path / "exit.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "exit.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: case.inputs.numpy()})
    assert torch.allclose(torch.from_numpy(found), case.answers(case.inputs)[1], atol=1e-5)


def test_a_budget_picks_thresholds() -> None:
    case = Case("residual")
    never, always = (math.inf, math.inf), (0.0, math.inf)
    rule = ExitRule(
        rule="margin", thresholds=never, temperatures=(1.0, 1.0, 1.0), frontier=((10.0, always), (30.0, never))
    )
    early = case.early(rule)
    with torch.no_grad():
        assert early(case.inputs, budget=29)[1].tolist() == [0] * 12
        assert early(case.inputs, budget=30)[1].tolist() == [2] * 12
        with pytest.raises(ValueError, match=r"budget=9: the cheapest thresholds cost 10 macs"):
            early(case.inputs, budget=9)


def test_copies_and_pickles_answer_alike_and_weights_that_change_are_seen() -> None:
    case = Case("residual")
    rule = case.rule()
    early = case.early(rule)
    with torch.no_grad():
        before = early(case.inputs)
        twin, again = copy.deepcopy(early), pickle.loads(pickle.dumps(early))
        assert twin._stages is early._stages
        for other in (twin, again):
            same(other(case.inputs), before)
        file = io.BytesIO()
        torch.save(early.state_dict(), file)
        for parameter in early.network.parameters():
            parameter.mul_(1.5)
        early.network.b[1].running_mean = early.network.b[1].running_mean + 1  # another tensor
        same(early(case.inputs), case.one_by_one(rule, case.inputs))
        same(twin(case.inputs), before)
        file.seek(0)
        early.load_state_dict(torch.load(file))
        same(early(case.inputs), before)


def test_other_types_and_shapes_are_split_anew() -> None:
    case = Case("residual")
    rule = case.rule()
    early = case.early(rule)
    with torch.no_grad():
        early(case.inputs)
        early.float()
        got = early(case.inputs.float())
        assert got[0].dtype == torch.float32
        case.inputs = case.inputs.float()
        same(got, case.one_by_one(rule, case.inputs), 1e-5)
        case.network.a = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()).eval()  # another module
        same(early(case.inputs), case.one_by_one(rule, case.inputs), 1e-5)
        case.network.a[0].weight.data = torch.randn(5, 6, 1, 1)  # as a cut of channels does
        case.network.a[0].bias.data = torch.randn(5)
        case.network.b[0].weight.data = torch.randn(6, 5, 3, 3)
        with pytest.raises(ValueError, match="The head of exit 'a' does not take what it returns"):
            early(case.inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = Case("residual", dtype)
    early = case.early(case.rule())
    with torch.no_grad():
        output, index = early(case.inputs)
        answers = torch.stack(case.answers(case.inputs))
    assert output.dtype == dtype
    expected = answers[index, torch.arange(12)]
    assert float((output - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_what_is_refused() -> None:
    case = Case("residual")
    early = case.early(case.rule())
    with pytest.raises(ValueError, match=r"stem\.1 \(BatchNorm2d\) is in training mode"):
        early.train()(case.inputs)
    early.eval()
    with pytest.raises(ValueError, match=r"An input is a tensor of shape \(12, 3, 5, 5\)"):
        early(case.inputs[..., :5, :5])
    with pytest.raises(ValueError, match="pass the same arguments"):
        early(case.inputs, case.inputs)
    for heads, message in {
        ("nowhere",): "Residual has no layer 'nowhere'",
        ("c", "a"): r"are not in the order in which their layers return: \['a', 'c'\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            EarlyExitNetwork(case.network, dict.fromkeys(heads, pooled(6)), None, case.inputs)
    with pytest.raises(ValueError, match="The head of exit 'a' returns shape"):
        EarlyExitNetwork(case.network, {"a": nn.Identity()}, None, case.inputs)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.rnn, self.unused = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.one(self.one(x)))[0][:, -1]


@pytest.mark.parametrize(
    ("layer", "message"), [("one", "runs 2 times"), ("unused", "does not run"), ("rnn", "returns a tuple")]
)
def test_layers_that_no_exit_can_follow(layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"The layer '{layer}' {message}"):
        EarlyExitNetwork(Twice(), {layer: nn.Linear(4, 4)}, None, torch.randn(2, 3, 4))


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(x - x.mean(0))


@pytest.mark.parametrize("whole_batch", [True, False])
def test_a_network_that_mixes_samples_is_refused(whole_batch: bool) -> None:
    with pytest.raises(ValueError, match="Mixes mixes the samples of a batch"):
        EarlyExitNetwork(Mixes(), {"a": nn.Linear(4, 3)}, None, torch.randn(3, 4), whole_batch=whole_batch)


def test_whole_batches_are_said(caplog: pytest.LogCaptureFixture) -> None:
    early = Case("asks").early(None)
    said = [one.getMessage() for one in caplog.records if one.name.startswith("lightning_compress")]
    assert len(said) == 1
    assert "Asks runs whole batches" in said[0]
    assert "torch.export cannot trace Asks" in early.reason


def test_an_exit_that_is_more_often_right_than_the_network_stays() -> None:
    case = Case("residual")
    rule = replace(case.rule(), shares=(0.4, 0.4, 0.2), advantages=(0.1, -0.1))
    assert case.early(rule, min_gain=math.inf).left_out == (1,)


@pytest.mark.parametrize("min_gain", [-math.inf, math.inf])
def test_an_exit_that_does_not_pay_is_left_out(min_gain: float, caplog: pytest.LogCaptureFixture) -> None:
    """By the clock; how gains follow from times is computed by hand in the function's own example."""
    case = Case("residual")
    rule = case.rule()
    rule = replace(rule, shares=(0.4, 0.4, 0.2), frontier=((1.0, (0.0, math.inf)),))
    with caplog.at_level("INFO"):
        early = case.early(rule, min_gain=min_gain)
    assert sorted(early.left_out) == ([0, 1] if min_gain > 0 else [])
    said = [one for one in caplog.records if one.name.startswith("lightning_compress")]
    assert len(said) == len(early.left_out)
    with torch.no_grad():
        index = early(case.inputs)[1]
        assert early(case.inputs, budget=1)[1].tolist() == [0] * 12  # where other shares leave
    assert bool((index == 2).all()) == (min_gain > 0)


@pytest.mark.parametrize("pays", [True, False])
def test_an_exit_that_does_not_pay_at_a_budget_is_not_run_there(pays: bool) -> None:
    case = Case("residual")
    never_sure = replace(case.rule(), thresholds=(2.0, 2.0))
    rule = replace(never_sure, frontier=((1.0, (2.0, 0.0)),), frontier_shares=((0.0, 0.9, 0.1),))
    early = case.early(rule, min_gain=-math.inf if pays else math.inf)
    calls = [0, 0]
    for number, head in enumerate(early.heads):
        head.register_forward_hook(lambda m, a, out, n=number: calls.__setitem__(n, calls[n] + 1))
    with torch.no_grad():
        assert set(early(case.inputs, budget=1.0)[1].tolist()) == {1 if pays else 2}
        assert calls == ([1, 1] if pays else [0, 0])
        early(case.inputs)
    assert calls == ([2, 2] if pays else [1, 1])  # the shares at the rule's own thresholds are not known


def test_kwargs_in_any_order_and_inputs_without_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, *, x: Tensor, table: Tensor, scale: float) -> Tensor:
            return self.fc(self.a(x).relu() * table * scale)

    torch.manual_seed(0)
    network, head = Scaled().eval(), nn.Linear(6, 3)
    inputs = {"x": torch.randn(9, 4), "table": torch.rand(6), "scale": 0.5}
    rule = ExitRule(rule="margin", thresholds=(0.15,), temperatures=(1.0, 1.0))
    early = EarlyExitNetwork(network, {"a": head}, rule, inputs).eval()
    with torch.no_grad():
        output, index = early(scale=0.5, table=inputs["table"], x=inputs["x"])
        both = torch.stack([head(network.a(inputs["x"])), network(**inputs)])
    assert 0 < int(index.sum()) < 9
    assert torch.allclose(output, both[index, torch.arange(9)], atol=1e-6)
    with pytest.raises(ValueError, match=r"An input is 0\.7, and was 0\.5"):
        early(**inputs | {"scale": 0.7})


@pytest.mark.parametrize("name", ["residual", "asks"])
def test_the_host_waits_once_at_each_open_exit(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, waits = torch.ops.aten, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (aten.nonzero.default, aten._local_scalar_dense.default, aten.equal.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    case = Case(name)
    for closed, count in (((), 2), ((1,), 1), ((0, 1), 0)):
        early = case.early(case.rule(closed=closed))
        waits.clear()
        with torch.no_grad(), Count():
            early(case.inputs)
        assert len(waits) == count + (name == "asks")  # its own question


def test_compiled_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dynamo, whose graphs run as they are: to compile them takes long."""
    compiled: list[nn.Module] = []
    real = torch.compile

    def compile(module: nn.Module) -> Any:
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    case = Case("residual")
    rule = case.rule()
    early = case.early(rule, compile=True)
    with torch.no_grad():
        same(early(case.inputs), case.one_by_one(rule, case.inputs))
        number = len(compiled)
        same(early(case.inputs[:7]), case.one_by_one(rule, case.inputs[:7]))
        assert len(compiled) == number
        same(copy.deepcopy(early)(case.inputs), case.one_by_one(rule, case.inputs))
    assert {id(one) for one in compiled} <= {id(stage.module) for stage in early._stages._stages.values()}


def test_inference_mode_and_gradients() -> None:
    case = Case("residual")
    rule = case.rule()
    expected = case.one_by_one(rule, case.inputs)
    early = pickle.loads(pickle.dumps(case.early(rule)))  # is split at the first call
    with torch.inference_mode():
        same(early(case.inputs), expected)
    assert not early.whole_batch
    output, _ = early(case.inputs)
    output.square().sum().backward()
    loss = sum(
        torch.stack([*case.early(None)(one[None], exit=int(k) + 1)[0]]).square().sum()
        for one, k in zip(case.inputs, expected[1], strict=True)
    )
    loss.backward()
    for mine, theirs in zip(early.network.parameters(), case.network.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 8])
def test_inputs_that_hooks_round(bits: int) -> None:
    """A sample alone may be rounded to another step, which is no sign of mixed samples."""
    from lightning_compress.quantization.input_grids import InputGrid, quantize_inputs

    case = Case("residual", torch.float32)
    names = [name for name, module in case.network.named_modules() if isinstance(module, nn.Conv2d)]
    quantize_inputs(case.network, {name: InputGrid.covering(-3.0, 3.0, bits) for name in names})
    early = case.early(None)
    assert not early.whole_batch
    for k, expected in enumerate(case.answers(case.inputs)):
        with torch.no_grad():
            assert torch.allclose(early(case.inputs, exit=k + 1)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("called", [False, True])
def test_a_copy_may_be_of_another_type_before_it_is_called(called: bool) -> None:
    """The stages of a copy are those that were made for the types of the original."""

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            result: Tensor = self.b(hidden.relu() + torch.arange(8).to(x.dtype))
            return result

    early = EarlyExitNetwork(Casts(), {"a": nn.Linear(8, 2)}, None, torch.randn(3, 4)).eval()
    if called:
        early(torch.randn(5, 4), exit=2)
    other = copy.deepcopy(early).double()
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(other(x, exit=2)[0], other.network(x))
