"""A zero map whose probabilities are learned during coding, because pruned rows and columns are unevenly full.

    step t:   x x . . x . x .     one slice of the tensor, along its first dimension or across it
              ^ block  ^          lanes are coded in blocks; a block is predicted from all blocks before it

Entries are predicted by logistic mixing. The log-odds that an entry is nonzero are a weighted sum of features. The
first feature is the log-odds over all entries so far. The others are differences to it, of the log-odds over
- the entries of the same lane,
- the entries of the same step,
- the entries with the same pattern of neighbours 1, 2, lag - 1, lag and lag + 1 steps before (the lag is 28 if the
  steps are the pixels of MNIST),
- the entries whose input is about as full: a unit that lost its inputs in one layer loses its outputs in the next.
After each block the weights w follow the gradient of the code length, for entries x with the probability p:

    w <- w + 2^-rate * sum over the block of features * (x - p)

All computations, tables included, use integers, so every machine gets the same probabilities.

Paper: Mahoney, Adaptive weighing of context models for lossless data compression (2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import cache

import numpy as np

from lightning_compress.coding.frequencies import PRECISION, TOTAL
from lightning_compress.coding.packing import Array
from lightning_compress.coding.streams import Reader, Writer

RATES = (9, 7)
MOST_STEPS = 1 << 14  # with more steps coding takes too long
_LAGS = 64  # the largest lag is one less
SETTINGS = math.log2(2 * len(RATES) * _LAGS)  # bits of axis, rate and lag
_ODDS = 8  # fractional bits of log-odds
_WEIGHT = 16  # fractional bits of weights
_ERROR = 12  # fractional bits of x - p
_FIRST_WEIGHTS = (65536, 32768, 32768, 13107, 32768)
_LANE_PRIOR, _STEP_PRIOR, _CONTEXT_PRIOR = 3, 20, 2  # prior counts, in entries
_NEIGHBOURS = 5
_FULLNESS = np.array([1, *(digit << i for i in range(24) for digit in (2, 3))])  # nonzero entries, by half octaves
_LIMIT = 12 << _ODDS  # largest magnitude of log-odds
_MANTISSA = 10  # bits of a mantissa that the table of logarithms resolves
_BLOCK, _BLOCKS = 16, 1 << 11  # fewest lanes of a block, and about the most blocks


def write_adaptive(writer: Writer, present: Array, rows: int, axis: int, rate: int, inputs: Array | None) -> None:
    """Write the map of nonzero entries.

    Args:
        writer: The writer.
        present: For each entry whether it is nonzero.
        rows: The size of the tensor's first dimension.
        axis: 0 if the steps go along the first dimension, 1 if they go across it.
        rate: The index of the learning rate in `RATES`.
        inputs: For each column the number of nonzero entries of its input, which the reader knows as well; or None.
    """
    map_TJ = _steps(present, rows, axis)
    lag = _best_lag(map_TJ)
    writer.uniform([axis], 2)
    writer.uniform([rate], len(RATES))
    writer.uniform([lag], _LAGS)
    found: list[Array] = []

    def known(step: int, lanes: slice, chances: Array) -> Array:
        found.append(chances)
        return map_TJ[step, lanes]

    _walk(map_TJ.shape, lag, RATES[rate], _classes(inputs, axis), known)
    writer.binary(map_TJ.reshape(-1), np.concatenate(found))


def least_bits(present: Array, rows: int, axis: int, inputs: Array | None) -> float:
    """Return a lower bound of the bits of `write_adaptive` at any rate: those of the settings and the first block."""
    map_TJ = _steps(present, rows, axis)
    bits = 0.0

    def first(step: int, lanes: slice, chances: Array) -> Array:
        nonlocal bits
        taken = np.where(map_TJ[step, lanes], chances, TOTAL - chances)
        bits = float((PRECISION - np.log2(taken)).sum())
        raise StopIteration

    with suppress(StopIteration):
        _walk(map_TJ.shape, 2, RATES[0], _classes(inputs, axis), first)
    return SETTINGS + bits


def read_adaptive(reader: Reader, out: Array, rows: int, inputs: Array | None) -> None:
    """Read a map that `write_adaptive` wrote, and set `out` to true where entries are nonzero."""
    axis = int(reader.uniform(1, 2)[0])
    rate = int(reader.uniform(1, len(RATES))[0])
    lag = int(reader.uniform(1, _LAGS)[0])
    if lag < 2:
        reader.fail(f"its zero map has a lag of {lag} steps, where at least 2 are expected")
    out_TJ = _steps(out, rows, axis)
    if len(out_TJ) > MOST_STEPS:
        reader.fail(f"its zero map has {len(out_TJ)} steps, more than {MOST_STEPS}")

    def read(step: int, lanes: slice, chances: Array) -> Array:
        bits = reader.binary(chances)
        out_TJ[step, lanes] = bits
        return bits.astype(np.bool_)

    _walk(out_TJ.shape, lag, RATES[rate], _classes(inputs, axis), read)


def _steps(entries: Array, rows: int, axis: int) -> Array:
    """Return a view of the entries in the shape steps x lanes."""
    matrix = entries.reshape(rows, -1)
    return matrix.T if axis else matrix


def _classes(inputs: Array | None, axis: int) -> Array | None:
    """Return a class for each input, by its number of nonzero entries, in the shape steps x 1 or 1 x lanes."""
    if inputs is None:
        return None
    classes = np.searchsorted(_FULLNESS, inputs, side="right")
    return classes[:, None] if axis else classes[None]


def _best_lag(map_TJ: Array) -> int:
    """Return the distance in steps at which most pairs of entries are both nonzero."""
    most = min(_LAGS, len(map_TJ))
    shares = {lag: np.mean(map_TJ[lag:] & map_TJ[:-lag]) for lag in range(2, most)}
    return max(shares, key=shares.__getitem__, default=2)


def _walk(
    shape: tuple[int, ...], lag: int, rate: int, classes: Array | None, code: Callable[[int, slice, Array], Array]
) -> None:
    """Predict block after block.

    Args:
        shape: The numbers of steps and lanes.
        lag: The distance in steps of the far neighbours.
        rate: The learning rate is 2^-rate.
        classes: The classes of the inputs, or None.
        code: A function that gets the step, the lanes and the probabilities of a block, in 2^-24, and returns which
            entries are nonzero.
    """
    steps, lanes = shape
    block = max(_BLOCK, -(-steps * lanes // _BLOCKS))
    weights = np.array(_FIRST_WEIGHTS[: 4 if classes is None else 5], np.int64)
    past = [np.zeros(lanes, np.int64)] * (lag + 1)  # the last steps
    shares: list[int] = []  # the fraction of nonzero entries of each step so far, in 2^-24
    of_lane = np.zeros((2, lanes), np.int64)  # the numbers of zero and of nonzero entries
    contexts = (1 << _NEIGHBOURS) + (0 if classes is None else len(_FULLNESS) + 1)
    of_context = np.zeros((2, contexts), np.int64)
    table = _chances()
    there = seen = expected = 0
    for step in range(steps):
        distances = (1, 2, lag - 1, lag, lag + 1)
        of_lanes = [sum(past[-distance] << place for place, distance in enumerate(distances))]
        if classes is not None:
            of_lanes.append(np.broadcast_to((1 << _NEIGHBOURS) + classes, shape)[step])
        context_CJ = np.stack(of_lanes)
        in_step = start = 0
        newest = np.zeros(lanes, np.int64)
        while start < lanes:
            here = slice(start, min(start + block, lanes))
            size = here.stop - start
            share = ((2 * there + 1) << PRECISION) // (2 * seen + 24)
            overall = _log(share) - _log(TOTAL - share)
            of_step = _log((in_step << PRECISION) + _STEP_PRIOR * expected) - _log(
                ((start - in_step) << PRECISION) + _STEP_PRIOR * (TOTAL - expected)
            )
            features = np.empty((len(weights), size), np.int64)
            features[0] = overall
            features[1] = _odds(of_lane[:, here], _LANE_PRIOR, share) - overall
            features[2] = of_step - overall
            features[3:] = (_odds(of_context, _CONTEXT_PRIOR, share) - overall).take(context_CJ[:, here])
            odds = (weights @ features) >> _WEIGHT
            chances = table.take((odds + _LIMIT + 2) >> 2, mode="clip")
            bits = code(step, here, chances)
            error = ((bits.astype(np.int64) << PRECISION) - chances) >> (PRECISION - _ERROR)
            weights += (features @ error) >> (_ODDS + _ERROR - _WEIGHT + rate)
            newest[here] = bits
            places = context_CJ[:, here] + contexts * newest[here]
            of_context += np.bincount(places.reshape(-1), minlength=2 * contexts).reshape(2, -1)
            count = int(np.count_nonzero(bits))
            in_step, there, seen, start = in_step + count, there + count, seen + size, here.stop
        of_lane += (1 - newest, newest)
        past = [*past[1:], newest]
        shares.append((in_step << PRECISION) // lanes)
        expected = (5 * shares[-1] + 3 * expected) >> 3 if step else shares[-1]
        if step >= lag:
            expected = (11 * expected + 5 * shares[step + 1 - lag]) >> 4
        expected = min(max(expected, 1 << 11), TOTAL - (1 << 11))


def _odds(entries: Array, prior: int, share: int) -> Array:
    """Return the log-odds from the numbers of zero and nonzero entries, plus `prior` entries with the overall share."""
    missing, there = _logs((entries << PRECISION) + prior * np.array([[TOTAL - share], [share]]))
    found: Array = there - missing
    return found


def _logs(numbers: Array) -> Array:
    """Return the natural logarithms of integers below 2^53, in 2^-8; frexp splits a float without rounding."""
    mantissas, exponents = np.frexp(numbers.astype(np.float64))
    places = (mantissas * (2 << _MANTISSA)).astype(np.int64) - (1 << _MANTISSA)
    tables = _log_tables()
    found: Array = tables[0][places] + tables[1][exponents]
    return found


def _log(number: int) -> int:
    """Return the natural logarithm of one integer, exactly as `_logs` does."""
    mantissa, exponent = math.frexp(number)
    mantissas, exponents = _log_lists()
    return mantissas[int(mantissa * (2 << _MANTISSA)) - (1 << _MANTISSA)] + exponents[exponent]


@cache
def _log_lists() -> tuple[list[int], list[int]]:
    mantissas, exponents = _log_tables()
    return mantissas.tolist(), exponents.tolist()


@cache
def _log_tables() -> tuple[Array, Array]:
    """Return tables of ln(1/2 + i / 2^11) and i ln 2, in 2^-8; decimal arithmetic is the same on every machine."""
    size = 1 << _MANTISSA
    unit = 1 << _ODDS
    mantissas = [round((Decimal(size + i) / (2 * size)).ln() * unit) for i in range(size)]
    return np.array(mantissas), np.array([round(i * Decimal(2).ln() * unit) for i in range(64)])


@cache
def _chances() -> Array:
    """Return a table of 1 / (1 + e^-x) in 2^-24, for x from -12 to 12 in steps of 1 / 64."""
    half = _LIMIT >> 2
    odds = [Decimal(i - half) / (1 << _ODDS - 2) for i in range(2 * half + 1)]
    return np.array([round(TOTAL / (1 + (-one).exp())) for one in odds])
