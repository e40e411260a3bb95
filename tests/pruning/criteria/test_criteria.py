from __future__ import annotations

import io
import itertools
import weakref
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.groups import Member
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.criteria import samples, weights
from lightning_compress.pruning.criteria.predictions import OutputCapture, prediction_of
from lightning_compress.pruning.criteria.samples import Ewc, Fisher, Mas, draw_labels
from lightning_compress.pruning.criteria.statistic import Statistic, estimate
from lightning_compress.pruning.criteria.weights import Obd, Si, Taylor, channel_norm, l2, magnitude, random

torch.set_num_threads(1)

WEIGHTS = ["0.weight", "3.weight", "5.weight"]
CLASSES = 3


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).double()


def make_batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 2, 3, 3, generator=generator, dtype=torch.double),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def gradients(objective: Tensor, model: nn.Module) -> dict[str, Tensor]:
    found = torch.autograd.grad(objective, [model.get_parameter(name) for name in WEIGHTS])
    return dict(zip(WEIGHTS, found, strict=True))


def mean(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([value[name] for value in values]).mean(0) for name in WEIGHTS}


def assert_equal(scores: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert scores.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], **tolerance)


def one_channel_each(name: str, weight: Tensor, dim: int = 0) -> Channels:
    index = torch.arange(weight.shape[dim])[:, None]
    return Channels(name, len(index), (Member(f"{name}.weight", dim, index),))


def make_channels(model: nn.Sequential) -> list[Channels]:
    """A grouped convolution whose channels go in pairs (0, 2) and (1, 3), a transposed one, a linear layer, and units
    that both convolutions make."""
    pairs = Member("0.weight", 0, torch.tensor([[0, 2], [1, 3]]))
    bias = Member("3.bias", 0, torch.tensor([[1], [0]]))
    turned = Member("3.weight", 1, torch.tensor([[1], [0]]))
    return [
        Channels("0", 2, (pairs,)),
        one_channel_each("3", model[3].weight, dim=1),
        one_channel_each("5", model[5].weight),
        Channels("0#2", 2, (bias, turned, pairs), weights=(turned, pairs)),
    ]


def channels_of(layer: Channels, values: Mapping[str, Tensor]) -> list[Tensor]:
    """The entries of every unit in all weights that score it, by a loop."""
    return [
        torch.cat(
            [
                values[member.tensor].select(member.dim, int(position)).flatten()
                for member in layer.weights
                for position in member.index[unit]
            ]
        )
        for unit in range(layer.size)
    ]


def channel_sums(layers: list[Channels], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer.name: torch.stack([entries.sum() for entries in channels_of(layer, scores)]) for layer in layers}


def numerical_gradient(model: nn.Module, name: str, loss, eps: float = 1e-5) -> Tensor:
    weight = model.get_parameter(name)
    flat, result = weight.data.view(-1), torch.zeros_like(weight)
    for i in range(flat.numel()):
        middle = flat[i].item()
        flat[i] = middle + eps
        above = loss(model).item()
        flat[i] = middle - eps
        below = loss(model).item()
        flat[i] = middle
        result.view(-1)[i] = (above - below) / (2 * eps)
    return result


# ---------------------------------------------------------------------- what looks at the weights alone


def test_static_scores():
    w = torch.tensor([[-2.0, 0.0], [0.5, 3.0]])
    assert magnitude(w).tolist() == [[2.0, 0.0], [0.5, 3.0]]
    assert l2(w).tolist() == [[4.0, 0.0], [0.25, 9.0]]
    assert not magnitude(w.requires_grad_()).requires_grad


def test_random_is_uniform_and_the_generators_own():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    scores = random(torch.empty(200, 100), generator)
    again = random(torch.empty(200, 100), generator)
    generator.set_state(state)
    torch.manual_seed(99)
    assert torch.equal(scores, random(torch.empty(200, 100), generator))
    assert not torch.equal(scores, again)
    # 20,000 draws: an error of 0.01 in a decile is 3.3 standard deviations or more.
    histogram = torch.histc(scores, bins=10, min=0, max=1) / scores.numel()
    assert (histogram - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("order", [1, 2])
def test_channel_norm(order):
    model = make_model()
    weights = dict(model.named_parameters())
    for layer in make_channels(model):
        expected = torch.stack([torch.linalg.vector_norm(entries, order) for entries in channels_of(layer, weights)])
        scores = channel_norm(weights, layer, order)
        assert not scores.requires_grad
        torch.testing.assert_close(scores, expected.detach())


# ---------------------------------------------------------------------- taylor


def test_taylor_is_the_mean_over_steps_of_gradient_times_weight():
    model, batches = make_model(), make_batches(3, 5)
    scores = estimate(Taylor(model, WEIGHTS), model, loss_fn, batches)
    expected = {
        name: torch.stack(
            [
                (numerical_gradient(model, name, lambda m, b=batch: loss_fn(m, b)) * model.get_parameter(name)).abs()
                for batch in batches
            ]
        )
        .mean(0)
        .detach()
        for name in WEIGHTS
    }
    assert_equal(scores, expected, rtol=1e-6, atol=1e-9)


def test_taylor_sees_the_gradient_that_accumulation_has_averaged():
    model = make_model()
    (x, labels) = make_batches(8)[0]
    whole = estimate(Taylor(model, WEIGHTS), model, loss_fn, [(x, labels)])
    statistic = Taylor(model, WEIGHTS)
    for micro_batch in ((x[:4], labels[:4]), (x[4:], labels[4:])):
        statistic.begin()
        loss = loss_fn(model, micro_batch) / 2
        statistic.before_backward(loss)
        loss.backward()
        statistic.end()
    statistic.before_step()
    statistic.after_step()
    assert_equal(statistic.scores(), whole)


# ---------------------------------------------------------------------- obd


class Small(nn.Module):
    """Seven parameters whose Hessian is far from diagonal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh_(self.first(x)))


SMALL = ["first.weight", "second.weight", "second.bias"]


def small_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).exp().mean()


def hessian_diagonal(model: Small, x: Tensor) -> dict[str, Tensor]:
    parameters = [model.get_parameter(name) for name in SMALL]
    sizes = [parameter.numel() for parameter in parameters]

    def loss_of(flat: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), parameters, strict=True)]
        values = dict(zip(SMALL, pieces, strict=True))
        return torch.func.functional_call(model, values, (x,)).exp().mean()

    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    diagonal = torch.autograd.functional.hessian(loss_of, flat).diagonal().split(sizes)
    return {name: piece.view_as(p) for name, piece, p in zip(SMALL, diagonal, parameters, strict=True)}


def test_obd_averaged_over_all_probes_is_the_exact_diagonal(monkeypatch):
    model = Small()
    x = torch.randn(5, 2, dtype=torch.double)
    shapes = [model.get_parameter(name).shape for name in SMALL]
    sizes = [shape.numel() for shape in shapes]
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=sum(sizes))), dtype=torch.double)
    pieces = iter([piece for probe in probes for piece in probe.split(sizes)])
    monkeypatch.setattr(weights, "random_signs", lambda like, generator: next(pieces).view_as(like))
    scores = estimate(Obd(model, SMALL), model, small_loss, [x] * len(probes))
    expected = {
        name: (h.abs() * model.get_parameter(name) ** 2 / 2).detach() for name, h in hessian_diagonal(model, x).items()
    }
    assert_equal(scores, expected)


def test_random_signs():
    signs = weights.random_signs(torch.empty(100, 100, dtype=torch.double), torch.Generator().manual_seed(0))
    assert signs.dtype is torch.double
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert abs(signs.mean()) < 0.03  # three standard deviations


def test_obd_leaves_the_ordinary_backward_alone():
    model, (batch,) = make_model(), make_batches(4)
    loss_fn(model, batch).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = loss_fn(model, batch)
    Obd(model, WEIGHTS).before_backward(loss)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_obd_is_zero_where_the_loss_is_linear():
    model = nn.Linear(3, 1).double()
    scores = estimate(Obd(model, ["weight"]), model, lambda m, x: m(x).mean(), [torch.ones(2, 3, dtype=torch.double)])
    assert scores["weight"].tolist() == [[0.0, 0.0, 0.0]]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def once_differentiable(layer: nn.Module, x: Tensor) -> Tensor:
    return Once.apply(layer(x)).square().mean()


def fused_attention(layer: nn.Module, x: Tensor) -> Tensor:
    x_BHTE = layer(x)[None, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(x_BHTE, x_BHTE, x_BHTE).square().mean()


@pytest.mark.parametrize("loss", [once_differentiable, fused_attention])
def test_obd_says_that_an_operator_has_no_second_derivative(loss):
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"criterion='obd' needs second derivatives.*fisher"):
        estimate(Obd(model, ["weight"]), model, loss, [torch.randn(4, 8)])


# ---------------------------------------------------------------------- fisher, ewc, mas


def per_sample(model: nn.Module, batches: list, objective) -> list[dict[str, Tensor]]:
    """Gradients of objective(output, label), each sample alone in its batch."""
    return [
        gradients(objective(model(x[n : n + 1]), labels[n : n + 1]), model)
        for x, labels in batches
        for n in range(len(x))
    ]


def mean_square(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return mean([{name: g.square() for name, g in value.items()} for value in values])


def times_square(model: nn.Module, values: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    return {name: (factor * value * model.get_parameter(name) ** 2).detach() for name, value in values.items()}


def test_fisher_equals_a_loop_over_samples():
    model, batches = make_model(), make_batches(3, 5)
    scores = estimate(Fisher(model, WEIGHTS), model, loss_fn, batches)
    assert_equal(scores, times_square(model, mean_square(per_sample(model, batches, F.cross_entropy)), 0.5))


def test_fisher_of_a_channel_lets_all_its_weights_go_together():
    model, batches = make_model(), make_batches(3, 5)
    layers = make_channels(model)
    scores = estimate(Fisher(model, layers), model, loss_fn, batches)
    samples = per_sample(model, batches, F.cross_entropy)
    changes = [
        channel_sums(layers, {name: g * model.get_parameter(name) for name, g in sample.items()}) for sample in samples
    ]
    expected = {
        layer.name: torch.stack([change[layer.name] ** 2 for change in changes]).mean(0).detach() for layer in layers
    }
    assert_equal(scores, expected)


def test_fisher_of_a_transposed_convolution_with_groups():
    """A column of the weight, (in, out / groups), makes an output channel of every group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES))
    model = model.double()
    batch = torch.randn(3, 4, 3, 3, dtype=torch.double), torch.tensor([0, 2, 1])
    columns = Channels("0", 3, (Member("0.weight", 1, torch.arange(3)[:, None]),))
    expected = torch.zeros(3, dtype=torch.double)
    for n in range(3):
        (g,) = torch.autograd.grad(loss_fn(model, (batch[0][n : n + 1], batch[1][n : n + 1])), model[0].weight)
        expected += (g * model[0].weight).sum((0, 2, 3)).detach() ** 2 / 3
    assert_equal(estimate(Fisher(model, [columns]), model, loss_fn, [batch]), {"0": expected})


def test_fisher_inside_of_autocast_is_the_same_as_outside():
    torch.manual_seed(0)
    model, x, labels = nn.Linear(16, 4), torch.randn(64, 16), torch.randint(4, (64,))
    inside, outside = Fisher(model, ["weight"]), Fisher(model, ["weight"])
    inside.begin()
    outside.begin()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model, (x, labels))
        inside.before_backward(loss)
    outside.before_backward(loss)
    assert_equal(inside.scores(), outside.scores(), rtol=0, atol=0)


def test_ewc_with_given_labels_equals_a_loop_over_samples(monkeypatch):
    model, batches = make_model(), make_batches(3, 5)
    drawn = [torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2, 1, 1])]
    pending = iter(drawn)
    monkeypatch.setattr(samples, "draw_labels", lambda logits, generator: next(pending))
    scores = estimate(Ewc(model, WEIGHTS, network=model), model, loss_fn, batches)
    relabelled = [(x, labels) for (x, _), labels in zip(batches, drawn, strict=True)]
    assert_equal(scores, times_square(model, mean_square(per_sample(model, relabelled, F.cross_entropy))))


def test_ewc_approaches_the_fisher_information_and_is_not_fisher():
    model, batches = make_model(), make_batches(4)
    ewc = Ewc(model, WEIGHTS, network=model, generator=torch.Generator().manual_seed(0))
    ((x, labels),) = batches
    scores = estimate(ewc, model, loss_fn, [(x.repeat(1000, 1, 1, 1), labels.repeat(1000))] * 4)
    information = {name: torch.zeros_like(model.get_parameter(name)) for name in WEIGHTS}
    for n, label in itertools.product(range(len(x)), range(CLASSES)):
        log_p = F.log_softmax(model(x[n : n + 1]), dim=1)[0, label]
        for name, g in gradients(log_p, model).items():
            information[name] += log_p.exp().detach() * g**2 / len(x)
    expected = times_square(model, information)
    empirical = estimate(Fisher(model, WEIGHTS), model, loss_fn, batches)
    for name in WEIGHTS:
        error = (scores[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.02
        assert (2 * empirical[name] - expected[name]).norm() / expected[name].norm() > 0.2


def test_labels_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -2.0, -torch.inf]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    labels = draw_labels(logits, generator)
    frequencies = torch.bincount(labels, minlength=4) / len(labels)
    assert frequencies[3] == 0
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.011, rtol=0)  # three standard deviations
    assert draw_labels(logits[:6].reshape(2, 3, 4).movedim(-1, 1), generator).shape == (2, 3)


class Tagger(nn.Module):
    """Logits at positions, in a dataclass-like output with the classes last."""

    def __init__(self, wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, CLASSES).double()
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(self.head(x))


def test_ewc_sums_over_positions(monkeypatch):
    labels = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
    monkeypatch.setattr(samples, "draw_labels", lambda logits, generator: labels)
    model, x = Tagger(lambda logits: SimpleNamespace(logits=logits)), torch.randn(2, 4, 3, dtype=torch.double)
    ewc = Ewc(model, ["head.weight"], network=model)
    scores = estimate(ewc, model, lambda m, x: m(x).logits.square().mean(), [x])["head.weight"]
    weight = model.head.weight
    squares = [
        torch.autograd.grad(F.cross_entropy(model.head(x[n]), labels[n], reduction="sum"), weight)[0] ** 2
        for n in range(2)
    ]
    torch.testing.assert_close(scores, ((squares[0] + squares[1]) / 2 * weight**2).detach())


def test_mas_equals_a_loop_over_samples():
    model, batches = make_model(), make_batches(3, 5)
    scores = estimate(Mas(model, WEIGHTS, network=model), model, loss_fn, batches)
    samples = per_sample(model, batches, lambda output, _: output.square().sum())
    assert_equal(scores, mean([{name: g.abs() for name, g in sample.items()} for sample in samples]))
    # Labels do not matter.
    relabelled = [(x, (labels + 1) % CLASSES) for x, labels in batches]
    assert_equal(estimate(Mas(model, WEIGHTS, network=model), model, loss_fn, relabelled), scores, rtol=0, atol=0)


def outputs_of(model: nn.Module) -> dict[type[Statistic], dict[str, nn.Module]]:
    return {Taylor: {}, Obd: {}, Fisher: {}, Ewc: {"network": model}, Mas: {"network": model}}


def test_criteria_differ_from_each_other():
    model, batches = make_model(), make_batches(8)
    scores = [
        torch.cat(
            [score.flatten() for score in estimate(kind(model, WEIGHTS, **options), model, loss_fn, batches).values()]
        )
        for kind, options in outputs_of(model).items()
    ]
    for one, other in itertools.combinations(scores, 2):
        assert abs(F.cosine_similarity(one, other, dim=0)) < 0.99


@pytest.mark.parametrize("kind", [Taylor, Obd, Ewc, Mas])
def test_a_channel_is_the_sum_over_its_weights(kind):
    model, batches = make_model(), make_batches(3, 5)
    layers, options = make_channels(model), outputs_of(model)[kind]
    scores = estimate(kind(model, layers, **options), model, loss_fn, batches)
    per_weight = estimate(kind(model, WEIGHTS, **options), model, loss_fn, batches)
    assert_equal(scores, channel_sums(layers, per_weight))


# ---------------------------------------------------------------------- si


def train(statistic: Si, weight: nn.Parameter, loss, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        statistic.before_step()
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        optimizer.step()
        statistic.after_step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_si_attributes_the_decrease_of_the_loss_to_the_weights(momentum):
    """L = sum_k a_k w_k^2 / 2 is a sum of one term per weight, so that each weight's share is known."""
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.double)
    a = torch.tensor([[1.0, 0.3, 4.0]], dtype=torch.double)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-4, momentum=momentum)
    statistic = Si(model, ["weight"], xi=0.01)
    train(statistic, model.weight, lambda: (a * model.weight**2).sum() / 2, optimizer, 400)
    end = model.weight.detach()
    decrease = a * (start**2 - end**2) / 2
    assert decrease.min() > 0.01
    expected = decrease / ((end - start) ** 2 + 0.01)
    torch.testing.assert_close(statistic.scores()["weight"], expected, rtol=0.01, atol=0)


def test_si_sums_up_to_the_decrease_of_a_coupled_loss():
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.double)
    root = torch.randn(3, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return (model.weight @ root).square().sum() / 2

    before = loss().item()
    statistic = Si(model, ["weight"])
    train(statistic, model.weight, loss, torch.optim.Adam(model.parameters(), lr=5e-4), 400)
    assert statistic.sums["weight"].sum().item() == pytest.approx(before - loss().item(), rel=0.01)


def test_si_forgets_nothing_at_an_event_and_ignores_what_the_mask_moves():
    model = nn.Linear(3, 1, bias=False).double()
    statistic = Si(model, ["weight"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(statistic, model.weight, lambda: model.weight.square().sum(), optimizer, 3)
    omega = statistic.sums["weight"].clone()
    statistic.reset()
    with torch.no_grad():
        model.weight[0, 0] = 0.0
    train(statistic, model.weight, lambda: model.weight.square().sum(), optimizer, 1)
    assert statistic.sums["weight"][0, 0] == omega[0, 0]
    assert (statistic.sums["weight"][0, 1:] > omega[0, 1:]).all()


def test_si_of_a_channel_is_the_sum_over_its_weights():
    model, (batch,) = make_model(), make_batches(4)
    layers = make_channels(model)
    of_weights, of_channels = Si(model, WEIGHTS), Si(model, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        of_weights.before_step()
        of_channels.before_step()
        optimizer.step()
        of_weights.after_step()
        of_channels.after_step()
    assert_equal(of_channels.scores(), channel_sums(layers, of_weights.scores()))


# ---------------------------------------------------------------------- state, ranks, hooks

KINDS = [Taylor, Obd, Fisher, Ewc, Si, Mas]


def make(kind: type[Statistic], model: nn.Module, targets, seed: int = 0) -> Statistic:
    options = outputs_of(model).get(kind, {})
    if kind in (Obd, Ewc):
        options = {**options, "generator": torch.Generator().manual_seed(seed)}
    return kind(model, targets, **options)


def step(statistics: list[Statistic], model: nn.Module, batch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for statistic in statistics:
        statistic.begin()
    loss = loss_fn(model, batch)
    for statistic in statistics:
        statistic.before_backward(loss)
    loss.backward()
    for statistic in statistics:
        statistic.end()
        statistic.before_step()
    optimizer.step()
    for statistic in statistics:
        statistic.after_step()


@pytest.mark.parametrize("targets", ["weights", "channels"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_continues_identically(kind, targets):
    model, (first, second) = make_model(), make_batches(3, 5)
    names = WEIGHTS if targets == "weights" else make_channels(model)
    original = make(kind, model, names)
    step([original], model, first)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    resumed = make(kind, model, names, seed=7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step([original, resumed], model, second)
    assert_equal(resumed.scores(), original.scores(), rtol=0, atol=0)
    original.reset()
    assert all(count == 0 for count in original.counts.values()) or kind is Si


def test_a_loaded_state_is_a_copy():
    model, batches = make_model(), make_batches(3, 5)
    original, copy = Mas(model, WEIGHTS, network=model), Mas(model, WEIGHTS, network=model)
    expected = estimate(original, model, loss_fn, batches)
    copy.load_state_dict(original.state_dict())
    estimate(copy, model, loss_fn, batches)
    assert_equal(original.scores(), expected, rtol=0, atol=0)


def test_a_state_that_does_not_fit_is_refused():
    model = make_model()
    state = Taylor(model, WEIGHTS[:1]).state_dict()
    with pytest.raises(ValueError, match="is of criterion 'taylor', but this is 'fisher'"):
        Fisher(model, WEIGHTS[:1]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"for '3.weight' of shape .* the checkpoint holds nothing"):
        Taylor(model, WEIGHTS).load_state_dict(state)


@pytest.mark.parametrize("kind", [Obd, Fisher, Ewc, Mas])
def test_two_ranks_see_what_one_sees(kind, monkeypatch):
    # Labels and probes that depend on the data alone, as those of the ranks' own generators do not.
    monkeypatch.setattr(samples, "draw_labels", lambda logits, generator: logits.argmin(1))
    monkeypatch.setattr(weights, "random_signs", lambda like, generator: torch.ones_like(like))
    model, (first, second) = make_model(), make_batches(3, 5)
    whole = make(kind, model, WEIGHTS)
    ranks = [make(kind, model, WEIGHTS), make(kind, model, WEIGHTS)]
    estimate(whole, model, loss_fn, [first, second])
    for statistic, batch in zip(ranks, (first, second), strict=True):
        estimate(statistic, model, loss_fn, [batch])
    sent: list[Tensor] = []
    ranks[0].reduce(lambda tensor: (sent.append(tensor.clone()), tensor)[1])
    received = iter(sent)
    ranks[1].reduce(lambda tensor: tensor.add_(next(received)))
    assert_equal(ranks[1].scores(), whole.scores())


@pytest.mark.parametrize("kind", [Taylor, Si])
def test_what_is_equal_on_all_ranks_is_not_summed(kind):
    model, (batch,) = make_model(), make_batches(3)
    statistic = make(kind, model, WEIGHTS)
    step([statistic], model, batch)
    before = {name: score.clone() for name, score in statistic.scores().items()}
    statistic.reduce(lambda tensor: 2 * tensor)
    assert_equal(statistic.scores(), before, rtol=0, atol=0)


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_no_hook_stays_after_an_exception(kind):
    model, (good,) = make_model(), make_batches(4)
    bad = (good[0][:, :1], good[1])
    expected, statistic = make(kind, model, WEIGHTS), make(kind, model, WEIGHTS)
    statistic.begin()
    with pytest.raises(RuntimeError):
        loss_fn(model, bad)
    statistic.end()
    statistic.end()
    assert n_hooks(model) == 0
    step([statistic, expected], model, good)
    assert n_hooks(model) == 0
    assert_equal(statistic.scores(), expected.scores(), rtol=0, atol=0)


def test_the_end_lets_the_graph_go():
    model, (batch,) = make_model(), make_batches(4)
    statistic = Mas(model, WEIGHTS, network=model)
    statistic.begin()
    output = model(batch[0])
    assert statistic.layers.calls
    alive = weakref.ref(output)
    del output
    assert alive() is not None
    statistic.end()
    assert alive() is None
    assert not statistic.layers.calls


def test_estimate_leaves_the_model_as_it_was():
    model, batches = make_model(), make_batches(3, 5)
    loss_fn(model, batches[0]).backward()
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in model.parameters()]
    for kind, options in outputs_of(model).items():
        estimate(kind(model, WEIGHTS, **options), model, loss_fn, batches)
    for parameter, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)
    assert n_hooks(model) == 0


def test_two_losses_of_one_forward_pass_count_the_samples_once():
    model, (batch,) = make_model(), make_batches(4)
    statistic = Mas(model, WEIGHTS, network=model)
    statistic.begin()
    output = model(batch[0])
    for loss in (output.sum(), output.square().sum()):
        statistic.before_backward(loss)
        loss.backward(retain_graph=True)
    statistic.end()
    assert set(statistic.counts.values()) == {4}


# ---------------------------------------------------------------------- the network's output


class Redirected(nn.Module):
    """Runs its training step inside its own call, as Lightning does under DistributedDataParallel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.in_training_step = False

    def forward(self, x: Tensor):
        if self.in_training_step:
            self.in_training_step = False
            return {"loss": self(x).sum()}
        return self.layer(x)


def test_only_the_innermost_call_returns_a_prediction():
    model = Redirected()
    capture = OutputCapture(model, None, criterion="mas")
    capture.watch()
    model.in_training_step = True
    model(torch.ones(4, 3))
    assert [prediction.shape for prediction in capture.take()] == [(4, 2)]
    with torch.no_grad():
        model(torch.ones(4, 3))
    assert capture.take() == []


def test_the_prediction_is_picked_from_an_output():
    logits = torch.randn(2, 5, 3)
    assert prediction_of(logits, None, "net") is logits
    assert prediction_of((1, logits), 1, "net") is logits
    assert prediction_of((1, logits), -1, "net") is logits
    assert prediction_of({"scores": logits}, "scores", "net") is logits
    assert prediction_of(SimpleNamespace(scores=logits), "scores", "net") is logits
    assert torch.equal(prediction_of(SimpleNamespace(logits=logits), None, "net"), logits.transpose(1, 2))
    assert prediction_of(SimpleNamespace(logits=logits[0]), None, "net") is not None
    with pytest.raises(ValueError, match=r"net returns a dict with 'a', 'b', and no tensor: pass network="):
        prediction_of({"a": 1, "b": 2}, None, "net")
    with pytest.raises(ValueError, match="net returns a tuple of 2, which has no output=2"):
        prediction_of((1, logits), 2, "net")
    with pytest.raises(ValueError, match="net returns a int as output='scores', and no tensor: pass network="):
        prediction_of(SimpleNamespace(scores=1), "scores", "net")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen(kind):
    model = make_model()
    with pytest.raises(ValueError, match=f"criterion='{kind.criterion}' needs .*'0.weight' and 2 more.*start_epoch"):
        make(kind, model, WEIGHTS).scores()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_target(kind):
    model = make_model()
    model[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=f"criterion='{kind.criterion}' needs the gradient of '3.weight'.*frozen"):
        make(kind, model, WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_target(kind):
    with pytest.raises(ValueError, match=r"'0\.weigth' is no parameter of the model"):
        make(kind, make_model(), ["0.weigth"])


def test_a_layer_that_is_never_called():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    statistic = Fisher(attention, ["out_proj.weight"])
    with pytest.raises(ValueError, match=r"needs calls of a layer.*'out_proj.weight'"):
        estimate(statistic, attention, lambda m, x: m(x, x, x)[0].square().mean(), [torch.randn(2, 3, 4)])


@pytest.mark.parametrize("kind", [Ewc, Mas])
def test_a_network_that_is_never_called(kind):
    model = nn.Sequential(make_model())
    statistic = kind(model, ["0.5.weight"], network=model)
    with pytest.raises(
        ValueError, match=f"'{kind.criterion}' needs the network's output.*never called Sequential.*network="
    ):
        estimate(statistic, model, lambda m, batch: loss_fn(m[0], batch), make_batches(4))


@pytest.mark.parametrize("wrap", [lambda y: y[:, 0], lambda y: y[:, :1], lambda y: y.mean()])
def test_ewc_needs_logits(wrap):
    model = Tagger(wrap)
    with pytest.raises(ValueError, match=r"criterion='ewc' draws labels .*shape"):
        estimate(
            Ewc(model, ["head.weight"], network=model),
            model,
            lambda m, x: m(x).square().mean(),
            [torch.randn(2, 3, dtype=torch.double)],
        )


def test_mas_needs_samples():
    model = Tagger(lambda y: y.mean())
    with pytest.raises(ValueError, match=r"criterion='mas' needs the network's output.*network="):
        estimate(
            Mas(model, ["head.weight"], network=model),
            model,
            lambda m, x: m(x),
            [torch.randn(2, 3, dtype=torch.double)],
        )


def test_si_cannot_be_estimated():
    model = make_model()
    with pytest.raises(ValueError, match=r"'si' must see the weights move.*training loop"):
        estimate(Si(model, WEIGHTS), model, loss_fn, make_batches(4))


@pytest.mark.parametrize("xi", [0.0, -1.0, float("nan")])
def test_si_needs_a_positive_xi(xi):
    with pytest.raises(ValueError, match=f"xi must be > 0; got {xi}"):
        Si(make_model(), WEIGHTS, xi=xi)


# ---------------------------------------------------------------------- what is not finite


def skip(statistic: Statistic, model: nn.Module, batch, value: float, place: str) -> None:
    """A step that is not finite, and that its optimizer leaves out, as under GradScaler."""
    statistic.begin()
    loss = loss_fn(model, (batch[0] * value, batch[1])) if place == "input" else loss_fn(model, batch) * value
    statistic.before_backward(loss)
    loss.backward()
    statistic.end()
    statistic.before_step()
    statistic.after_step()


@pytest.mark.parametrize("place", ["loss", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("targets", ["weights", "channels"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(kind, targets, value, place, monkeypatch):
    monkeypatch.setattr(samples, "draw_labels", lambda logits, generator: logits.argmin(1))
    monkeypatch.setattr(weights, "random_signs", lambda like, generator: torch.ones_like(like))
    good = make_batches(3, 5)
    scores = []
    for batches in (good, [good[0], None, good[1]]):
        model = make_model()
        statistic = make(kind, model, WEIGHTS if targets == "weights" else make_channels(model))
        for batch in batches:
            model.zero_grad()
            if batch is not None:
                step([statistic], model, batch)
                continue
            with pytest.warns(UserWarning, match=f"'{statistic.criterion}' leaves out what it sees of a batch"):
                skip(statistic, model, good[0], value, place)
        scores.append(statistic.scores())
    assert_equal(scores[1], scores[0], rtol=0, atol=0)


def test_one_entry_that_is_not_finite_leaves_the_whole_step_out():
    model, (batch,) = make_model(), make_batches(3)
    taylor = Taylor(model, WEIGHTS)
    loss_fn(model, batch).backward()
    model[5].weight.grad[0, 0] = torch.inf
    with pytest.warns(UserWarning, match="criterion='taylor' leaves out"):
        taylor.before_step()
    with pytest.raises(ValueError, match="1 batches were left out, which were not finite"):
        taylor.scores()
