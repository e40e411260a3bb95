"""Layers of low rank: a weight becomes a product of thin ones."""

from lightning_compress.low_rank.factors import Factors, errors, factor
from lightning_compress.low_rank.merge import merge
from lightning_compress.low_rank.nuclear import WeightMatrix, shrink_ranks, weight_matrices
from lightning_compress.low_rank.replace import LowRankReport, lower_rank

__all__ = [
    "Factors",
    "LowRankReport",
    "WeightMatrix",
    "errors",
    "factor",
    "lower_rank",
    "merge",
    "shrink_ranks",
    "weight_matrices",
]
