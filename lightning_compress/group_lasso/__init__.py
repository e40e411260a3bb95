"""A penalty that pulls groups of weights to zero, from plain functions to a callback."""

from __future__ import annotations

from lightning_compress.group_lasso.penalty import (
    WeightGroups,
    add_gradient,
    penalty,
    producer_groups,
    shrink_groups,
    weight_groups,
)

__all__ = ["WeightGroups", "add_gradient", "penalty", "producer_groups", "shrink_groups", "weight_groups"]
