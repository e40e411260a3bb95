"""Hinton's MNIST (Hinton et al. 2015, section 3): what a teacher with dropout and jitter gives a plain student.

Teacher: 784-1200-1200-10, two fifths of the hidden units dropped, images jittered by up to two pixels; half of them
and a fifth of the inputs, in batches of 128, left 117 errors on 10,000 validation images after 40 epochs, where three
tenths of the hidden units alone, in batches of 256, left 104. Student: 784-800-800-10 without regularisation on the
images as they are, alone and distilled at T = 20 on the soft targets only; its learning rate, batch and epochs were
chosen on those validation images as well, with another seed. Then the same two students without the images of a digit:
they never see one, the teacher did. The bias of that digit is raised afterwards, as in the paper, by what makes fewest
errors on the test images; and, so that they select nothing, by what makes fewest on all training images.

All 60,000 training images train; what is counted are the errors of the last epoch's network on the 10,000 test images.

    python benchmarks/distillation_mnist.py --root data/mnist --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from distilling import arguments, errors, measure, scores, test_errors, train
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.baselines import MLP, MNIST

PUBLISHED = {"teacher": 67, "alone": 146, "distilled": 74}
PUBLISHED_MISSING = {("distilled", "none"): "206, 133", ("distilled", "test"): "109, 14 at +3.5"}  # the 3s
BIASES = torch.arange(0.0, 40.25, 0.25)


class Without(MNIST):
    """MNIST whose training part lacks a digit; None: it lacks nothing."""

    def __init__(self, digit: int | None = None, **settings: Any) -> None:
        super().__init__(val_size=0, normalize=False, **settings)
        self.digit = digit

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        (images, labels), test = super().read()
        keep = labels != (-1 if self.digit is None else self.digit)
        return (images[keep], labels[keep]), test


def raised(scores_NC: Tensor, digit: int, bias: float) -> Tensor:
    scores_NC = scores_NC.clone()
    scores_NC[:, digit] += bias
    return scores_NC


def best_bias(scores_NC: Tensor, labels: Tensor, digit: int) -> float:
    return min(BIASES.tolist(), key=lambda bias: errors(raised(scores_NC, digit, bias), labels))


def unseen_digit(network: nn.Module, data: MNIST, digit: int) -> dict[str, dict[str, float]]:
    """Return the errors of all test images and of the digit's, with its bias as it is and raised."""
    train_part, test_part = data.train_dataloader(), data.test_dataloader()
    found, labels = scores(network, test_part.inputs), test_part.targets
    biases = {
        "none": 0.0,
        "training": best_bias(scores(network, train_part.inputs), train_part.targets, digit),
        "test": best_bias(found, labels, digit),
    }
    rows = {}
    for source, bias in biases.items():
        corrected, of_digit = raised(found, digit, bias), labels == digit
        missed = errors(corrected[of_digit], labels[of_digit])
        rows[source] = {"bias": bias, "errors": errors(corrected, labels), "missed": missed}
        rows[source]["accuracy"] = 100 - 100 * missed / int(of_digit.sum())
    return rows


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    def student(digit: int | None, teacher: nn.Module | None) -> nn.Module:
        seed_everything(seed, verbose=False)
        data = Without(digit, root=options.root, seed=seed, batch_size=256)
        network = MLP(widths=(784, 800, 800, 10))
        return train(network, data, epochs=options.epochs, lr=2e-3, precision=options.precision, teacher=teacher)

    seed_everything(seed, verbose=False)
    whole = Without(root=options.root, seed=seed, shift=2, batch_size=256)
    teacher = MLP(widths=(784, 1200, 1200, 10), dropout=options.dropout, input_dropout=options.input_dropout)
    train(teacher, whole, epochs=options.teacher_epochs, lr=1e-3, precision=options.precision)
    row: dict[str, Any] = {"teacher": test_errors(teacher, whole)}
    for name, taught_by in (("alone", None), ("distilled", teacher)):
        row[name] = test_errors(student(None, taught_by), whole)
        for digit in options.missing:
            row[f"{name} without {digit}"] = unseen_digit(student(digit, taught_by), whole, digit)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--missing", type=int, nargs="*", default=[3], help="digits to leave out, each by itself")
    parser.add_argument("--teacher-epochs", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=80, help="of the students")
    parser.add_argument("--dropout", type=float, default=0.4, help="of the teacher's hidden units")
    parser.add_argument("--input-dropout", type=float, default=0.0, help="of its inputs")
    options = parser.parse_args()
    console = Console()
    rows = measure(one_seed, options, console)

    table = Table("network", "test errors, by seed", "median", "published", title="MNIST, T = 20")
    for name in ("teacher", "alone", "distilled"):
        counts = [row[name] for row in rows]
        table.add_row(name, " ".join(map(str, counts)), f"{statistics.median(counts):g}", f"{PUBLISHED[name]}")
    closed = [100 * (row["alone"] - row["distilled"]) / (row["alone"] - row["teacher"]) for row in rows]
    table.add_row(
        "gap closed", " ".join(f"{one:.0f} %" for one in closed), f"{statistics.median(closed):.0f} %", "91 %"
    )
    console.print(table)

    for digit in options.missing:
        title = f"Students that saw no {digit}: medians"
        table = Table("student", "bias raised by", "errors", f"of {digit}s", "right", "published (3s)", title=title)
        for student in ("alone", "distilled"):
            for source in ("none", "training", "test"):
                of_seeds = [row[f"{student} without {digit}"][source] for row in rows]
                median = {key: statistics.median(one[key] for one in of_seeds) for key in of_seeds[0]}
                table.add_row(
                    student,
                    f"{median['bias']:g}" + (f" (from {source} images)" if source != "none" else ""),
                    f"{median['errors']:g}",
                    f"{median['missed']:g}",
                    f"{median['accuracy']:.1f} %",
                    PUBLISHED_MISSING.get((student, source), "") if digit == 3 else "",
                )
        console.print(table)


if __name__ == "__main__":
    main()
