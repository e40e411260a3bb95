"""Quantization: weights that share a few values, from plain functions to a callback."""
