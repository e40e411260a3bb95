"""Pruning: score, remove a little, train on, repeat."""
