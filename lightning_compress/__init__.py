"""Network compression for people who already train with Lightning."""

from pathlib import Path

from lightning_compress.pruning.callback import IterativePruningCallback

__all__ = ["IterativePruningCallback"]
__version__ = "0.1.0"

_package = Path(__file__).parent
if not (_package / "conf").is_dir():  # an editable install: the wheel has conf/ inside, the repository beside
    __path__.append(str(_package.parent))
