"""Group lasso, a penalty that pulls groups of weights to zero, as plain functions and as a callback."""

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
