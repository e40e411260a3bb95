"""Layers that become other modules in place: what they compute, which may, what they see, and what they cost."""
