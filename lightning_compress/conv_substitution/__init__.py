"""Convolutions that become cheaper blocks."""

from lightning_compress.conv_substitution.callback import ConvSubstitutionCallback
from lightning_compress.conv_substitution.substitute import SubstitutionReport, substitute_convs

__all__ = ["ConvSubstitutionCallback", "SubstitutionReport", "substitute_convs"]
