from __future__ import annotations

import sys

import numpy as np
import pytest

from lightning_compress.report import Epoch, Layer, Measurement, Report, report_figure

DENSE = Measurement(0.98, 100, 100, 100, 400, 1.0)
HISTORY = (
    Epoch(0, 0.3, {}, "dense"),
    Epoch(1, 0.95, {}, "dense"),
    Epoch(0, 0.9, {"sparsity": 0.5, "bits": 32.0}, "compression"),
    Epoch(1, None, {"sparsity": 0.9, "bits": 3.0}, "compression"),
    Epoch(2, 0.94, {"sparsity": 0.9, "bits": 3.0}, "recovery"),
)
LAYERS = (Layer("conv", 200, 200, 50), Layer("fc", 1000, 1000, 10))


def test_the_panels_show_the_reports_numbers() -> None:
    figure = report_figure(Report(DENSE, DENSE, history=HISTORY, layers=LAYERS))
    left, right, sparsity = figure.axes
    curve = next(line for line in left.lines if len(line.get_xdata()) == 4)
    assert np.allclose(curve.get_xdata(), [1, 2, 3, 5]), "epochs are counted through; one was not validated"
    assert np.allclose(curve.get_ydata(), [30, 95, 90, 94])
    values = sparsity.patches[0].get_data().values
    assert np.allclose(values, [np.nan, np.nan, 0.5, 0.9, 0.9], equal_nan=True), "a dense epoch has no such number"
    assert sparsity.get_ylabel() == "sparsity"
    assert left.get_title(loc="left") == "val_acc and sparsity over the epochs"
    assert [text.get_text() for text in left.texts] == ["dense", "compression", "recovery"]
    assert sorted(line.get_xdata()[0] for line in left.lines if line is not curve) == [2.5, 4.5]
    assert left.get_ylim()[0] > 30, "the steep beginning leaves the frame"
    assert left.get_ylim()[0] < 90
    assert [bar.get_width() for bar in right.patches[2:]] == [25.0, 1.0]
    assert [label.get_text() for label in right.get_yticklabels()] == ["conv", "fc"]
    assert right.yaxis_inverted()
    assert {"together 60 of 1,200  (5.0 %)", "50 of 200  (25.0 %)"} <= {text.get_text() for text in right.texts}


def test_one_phase_hides_nothing() -> None:
    history = tuple(Epoch(i, acc, {}, "dense") for i, acc in enumerate([0.1, 0.8, 0.9]))
    left, *others = report_figure(Report(DENSE, DENSE, history=history)).axes
    assert left.get_ylim()[0] < 10
    assert len(others) == 1, "no technique names a number: no second axis"
    assert left.get_title(loc="left") == "val_acc over the epochs"


def test_a_number_above_one_is_inside_its_axis() -> None:
    history = tuple(Epoch(i, 0.9, {"weight_bits": bits}, "recovery") for i, bits in enumerate([8.0, 4.0]))
    *_, bits = report_figure(Report(DENSE, DENSE, history=history)).axes
    assert bits.get_ylabel() == "weight_bits"
    assert bits.get_ylim()[0] == 0
    assert bits.get_ylim()[1] > 8


def test_empty_panels_say_why() -> None:
    figure = report_figure(Report(DENSE, DENSE))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["no epoch was trained", "no layer was compared"]


def test_pyplot_knows_nothing_of_the_figure() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    report_figure(Report(DENSE, DENSE, history=HISTORY, layers=LAYERS))
    assert plt.get_fignums() == before


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning-compress\[figures\]"):
        report_figure(Report(DENSE, DENSE))
