"""The rules by which ATen operators propagate the labels of channels."""

from lightning_compress.channels.graph.operators import (  # noqa: F401  # each registers its rules
    contractions,
    convolutions,
    elementwise,
    indexing,
    norms,
    reductions,
    structure,
)
from lightning_compress.channels.graph.operators.call import Average, Call, run_rule, unknown, values_in

__all__ = ["Average", "Call", "run_rule", "unknown", "values_in"]
