"""Encodings of a tensor: the positions of its nonzero entries, and their values."""
