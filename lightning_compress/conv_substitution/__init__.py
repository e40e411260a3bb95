"""Convolutions that become cheaper blocks."""
