"""Convolutions that become cheaper blocks."""

from lightning_compress.conv_substitution.substitute import SubstitutionReport, substitute_convs

__all__ = ["SubstitutionReport", "substitute_convs"]
