"""Distillation: a network learns from what another one makes of the same inputs."""
