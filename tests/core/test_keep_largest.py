"""Masks of the largest scores, against sorting everything in plain Python, and under settings that force every path."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import TESTS
from support.resident import can_measure
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.core import keep_largest as module
from lightning_compress.core.keep_largest import keep_largest

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW_VALUES = [-math.inf, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf]


def expected(
    scores: list[Tensor], n_drop: int, *, absolute: bool = False, alive: list[Tensor | None] | None = None
) -> list[list[bool]]:
    """Sort (alive, score, position) and drop the first `n_drop`; flat masks."""
    entries = []
    for score, living in zip(scores, alive or [None] * len(scores), strict=True):
        values = score.double().flatten().tolist()
        lives = [True] * len(values) if living is None else living.flatten().tolist()
        for value, lives_on in zip(values, lives, strict=True):
            entries.append((lives_on, (abs(value) if absolute else value) if lives_on else 0.0, len(entries)))
    kept = {position for _, _, position in sorted(entries)[n_drop:]}
    masks, start = [], 0
    for score in scores:
        masks.append([start + i in kept for i in range(score.numel())])
        start += score.numel()
    return masks


def flat(masks: list[Tensor]) -> list[list[bool]]:
    return [mask.flatten().tolist() for mask in masks]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    values = st.sampled_from(FEW_VALUES) if draw(st.booleans()) else st.floats(-100, 100, width=16)
    size = math.prod(shape)
    tensor = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=draw(st.sampled_from(FLOATS)))
    order = draw(st.permutations(range(len(shape))))
    tensor = tensor.view(shape).permute(order)
    return tensor[::2] if shape and draw(st.booleans()) else tensor


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_equals_sorting(data: st.DataObject) -> None:
    scores = data.draw(st.lists(tensors(), max_size=4))
    sizes = [score.numel() for score in scores]
    n_drop = data.draw(st.integers(0, sum(sizes)))
    absolute = data.draw(st.booleans())
    alive: list[Tensor | None] = []
    n_spare = n_drop  # alive may exclude as many
    for score in scores:
        living = torch.tensor(data.draw(st.lists(st.booleans(), min_size=score.numel(), max_size=score.numel())))
        n_dead = int((~living.bool()).sum())
        if data.draw(st.booleans()) and n_dead <= n_spare:
            alive.append(living.bool().view(score.shape))
            n_spare -= n_dead
        else:
            alive.append(None)

    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), label="many rounds"):
            patch.setattr(module, "_SORTABLE", data.draw(st.integers(0, 6)))
            patch.setattr(module, "_CHUNK_CPU", data.draw(st.integers(1, 9)))
            patch.setattr(module, "_SPREAD", data.draw(st.sampled_from([0.01, 0.5, 3.0])))
        masks = keep_largest(scores, n_drop, absolute=absolute, alive=alive)

    assert flat(masks) == expected(scores, n_drop, absolute=absolute, alive=alive)
    for mask, score in zip(masks, scores, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        assert mask.is_contiguous()


N = 60_000


def awkward(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(N, generator=generator)
    return {
        "normal": normal,
        "all equal": torch.full((N,), 0.25),
        "half zero": normal * (torch.rand(N, generator=generator) < 0.5),
        "half zero, in one block": torch.cat([torch.zeros(N // 2), normal[: N // 2]]),
        "three values": torch.randint(3, (N,), generator=generator).float(),
        "ascending": normal.sort().values,
        "descending": normal.sort(descending=True).values,
        "periodic": normal[:100].repeat(N // 100),
        "one outlier": torch.cat([torch.zeros(N - 1), torch.tensor([1e30])]),
        "tiny": normal * 1e-41,  # subnormal
        "infinite": torch.where(normal > 1, torch.inf, normal),
    }[kind]


AWKWARD = (
    "normal",
    "all equal",
    "half zero",
    "half zero, in one block",
    "three values",
    "ascending",
    "descending",
    "periodic",
    "one outlier",
    "tiny",
    "infinite",
)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_inputs_that_need_several_rounds(kind: str, absolute: bool) -> None:
    score = awkward(kind)
    order = (score.abs() if absolute else score).double().sort(stable=True).indices
    for n_drop in (0, 1, N // 4, N // 2, N // 2 + 1, int(0.98 * N), N - 1, N):
        reference = torch.ones(N, dtype=torch.bool)
        reference[order[:n_drop]] = False
        masks = keep_largest(list(score.split([40_000, 1, 0, 19_999])), n_drop, absolute=absolute)
        assert torch.equal(torch.cat(masks), reference), n_drop


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", AWKWARD)
def test_one_pass_that_collects_little_is_enough(monkeypatch: pytest.MonkeyPatch, kind: str, absolute: bool) -> None:
    passes: list[int] = []
    split = module._split

    def count(*args: Any, **kwargs: Any) -> Any:
        n_above, between = split(*args, **kwargs)
        passes.append(sum(len(some.at) for some in between))
        return n_above, between

    monkeypatch.setattr(module, "_split", count)
    score = awkward(kind)
    alive = [torch.rand(part.shape, generator=torch.Generator().manual_seed(2)) < 0.2 for part in score.split(20_000)]
    alive[0] |= True  # the dead stand at the end
    n_dead = N - sum(int(living.sum()) for living in alive)
    for options, low in (({}, 0), ({"alive": alive}, n_dead)):
        for n_drop in (low, low + (N - low) // 3, low + (N - low) // 2, N - 100):
            passes.clear()
            keep_largest(list(score.split(20_000)), n_drop, absolute=absolute, **options)
            assert len(passes) <= 2, "a pass was repeated"  # the second over what the first collected
            assert passes[0] < 0.25 * N


@pytest.mark.parametrize("kind", ["normal", "all equal", "three values", "half zero"])
def test_cuts_that_miss_on_either_side(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "_SORTABLE", 0)
    monkeypatch.setattr(module, "_SPREAD", 0.01)
    monkeypatch.setattr(module, "_CHUNK_CPU", 64)
    score = awkward(kind)[:3000]
    order = score.sort(stable=True).indices
    for n_drop in range(0, 3001, 50):
        reference = torch.ones(3000, dtype=torch.bool)
        reference[order[:n_drop]] = False
        assert torch.equal(torch.cat(keep_largest(list(score.split([1000, 2000])), n_drop)), reference)


@pytest.mark.parametrize("kind", ["all equal", "three values"])
def test_every_number_in_chunks_of_two(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "_SORTABLE", 0)
    monkeypatch.setattr(module, "_SPREAD", 0.01)
    monkeypatch.setattr(module, "_CHUNK_CPU", 2)
    scores = [awkward(kind)[:31], awkward(kind)[:29]]
    for n_drop in range(61):
        assert flat(keep_largest(scores, n_drop)) == expected(scores, n_drop)


def test_differences_that_only_float64_holds() -> None:
    fine = 1 + 1e-12 * torch.randperm(10_000, generator=torch.Generator().manual_seed(3)).double()
    coarse = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    masks = keep_largest([coarse, fine], 4_001)
    assert masks[0].tolist() == [False, True]
    assert torch.equal(masks[1], fine >= fine.sort().values[4_000])


@pytest.mark.parametrize("chunk", [1_000, 4_096, 70_000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_chunks_and_cuts_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int, spread: float) -> None:
    score = awkward("half zero").view(200, 300).t()
    reference = keep_largest([score], N // 3)
    monkeypatch.setattr(module, "_CHUNK_CPU", chunk)
    monkeypatch.setattr(module, "_SPREAD", spread)
    assert torch.equal(keep_largest([score], N // 3)[0], reference[0])


def test_dead_entries_stay_dropped_whatever_their_score() -> None:
    score = awkward("normal")
    alive = score < 0.5  # the best are dead
    n_dead = int((~alive).sum())
    (mask,) = keep_largest([score], n_dead + 1000, alive=[alive])
    living = score[alive].sort().values
    assert torch.equal(mask, alive & (score >= living[1000]))
    assert torch.equal(keep_largest([score], n_dead, alive=[alive])[0], alive)
    with pytest.raises(ValueError, match=rf"n_drop={n_dead - 1} .* the {n_dead} entries that alive excludes"):
        keep_largest([score], n_dead - 1, alive=[alive])


def test_agrees_with_torch_prune() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 70), nn.Linear(70, 50), nn.Linear(50, 3))
    (*masks,) = keep_largest([layer.weight for layer in model], 8_000, absolute=True)
    prune.global_unstructured([(layer, "weight") for layer in model], prune.L1Unstructured, amount=8_000)
    for layer, mask in zip(model, masks, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("n_drop", [-1, 7])
def test_refuses_a_number_outside_the_entries(n_drop: int) -> None:
    with pytest.raises(ValueError, match=rf"n_drop={n_drop} must lie between the 0 .* all 6 entries"):
        keep_largest([torch.ones(2, 3)], n_drop)


@pytest.mark.parametrize("n_drop", [0, 3, 6])
@pytest.mark.parametrize("dtype", FLOATS)
def test_refuses_nan_and_says_where(n_drop: int, dtype: torch.dtype) -> None:
    scores = [
        torch.zeros(0),
        torch.tensor([[1.0, math.nan], [math.nan, 2.0]], dtype=dtype),
        torch.tensor([math.inf, 0]),
    ]
    with pytest.raises(ValueError, match=re.escape("2 of 4 in scores[1].")):
        keep_largest(scores, n_drop)
    with pytest.raises(ValueError, match=re.escape("2 of 4 in fc2.weight.")):
        keep_largest(scores, n_drop, absolute=True, names=["fc1.weight", "fc2.weight", "fc3.weight"])


def test_refuses_other_dtypes_and_masks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("scores[0] is torch.int64: scores must be one of torch.float16")):
        keep_largest([torch.ones(3, dtype=torch.int64)], 1)
    with pytest.raises(ValueError, match=re.escape("alive for w is torch.bool of shape (3, 2)")):
        keep_largest([torch.ones(2, 3)], 1, alive=[torch.ones(3, 2, dtype=torch.bool)], names=["w"])
    with pytest.raises(ValueError, match=r"alive for w is torch\.float32"):
        keep_largest([torch.ones(2, 3)], 1, alive=[torch.ones(2, 3)], names=["w"])


def test_touches_neither_its_inputs_nor_the_random_state() -> None:
    weight = nn.Parameter(awkward("normal"))
    before, random_state = weight.detach().clone(), torch.get_rng_state()
    with torch.device("meta"):  # a default device of the user's
        (mask,) = keep_largest([weight], N // 2, absolute=True)
    assert int(mask.sum()) == N - N // 2
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["normal", "all equal", "half zero", "infinite"])
def test_the_same_on_a_gpu(kind: str) -> None:
    score = awkward(kind)
    alive = torch.arange(N) % 7 > 0
    (on_cpu,) = keep_largest([score], N // 2, alive=[alive])
    (on_gpu,) = keep_largest([score.cuda()], N // 2, alive=[alive.cuda()])
    assert torch.equal(on_gpu.cpu(), on_cpu)


MEASURE = """
import runpy, sys, torch
from support.resident import forget_peak, peak, resident

keep_largest = runpy.run_path(sys.argv[1])["keep_largest"]  # without the package's other, slow imports
torch.set_num_threads(1)
size = 20_000_000
for kind in ("random", "constant", "transposed", "half dead"):
    score = torch.full((4000, 5000), 0.5) if kind == "constant" else torch.rand(4000, 5000)
    score = score.t() if kind == "transposed" else score
    alive = [torch.rand(score.shape) < 0.5] if kind == "half dead" else None
    forget_peak()
    before = resident()
    (mask,) = keep_largest([score], int(0.75 * size), absolute=True, alive=alive)
    print(kind, (peak() - before - size) // 10**6, sep=",")
"""


@pytest.mark.skipif(not can_measure(), reason="needs Linux to measure the peak")
def test_needs_little_memory_besides_the_masks() -> None:
    command = [sys.executable, "-c", MEASURE, module.__file__]
    run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True)
    megabytes = {kind: int(extra) for kind, extra in (line.split(",") for line in run.stdout.splitlines())}
    assert len(megabytes) == 4
    assert max(megabytes.values()) < 30, megabytes  # one copy of the scores would be 80
