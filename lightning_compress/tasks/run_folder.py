"""The names of the files in a run's folder."""

from __future__ import annotations

from pathlib import Path

COMPRESSED, SMALL = "compressed.ckpt", "compressed.lcz"
CONFIG = "config.yaml"  # the composed config, resolved
CHECKPOINTS = "checkpoints"  # a folder
SEARCH = "search.json"  # the decisions of a search for widths
TUNING = "tuning.ckpt"  # the last epoch of the training that follows


def dense_files(folder: str | Path, number: int) -> list[str]:
    """Return the paths of the checkpoints of a run's dense networks.

    Example:
        >>> dense_files("run", 3)
        ['run/dense.ckpt', 'run/dense-1.ckpt', 'run/dense-2.ckpt']
    """
    return [str(Path(folder) / ("dense.ckpt" if i == 0 else f"dense-{i}.ckpt")) for i in range(number)]


def home(source: str | Path) -> Path:
    """Return the folder of the run that wrote a file.

    Example:
        >>> home("run/compressed.lcz") == home("run/checkpoints/last.ckpt") == Path("run")
        True
    """
    folder = Path(source).parent
    return folder.parent if folder.name == CHECKPOINTS else folder
