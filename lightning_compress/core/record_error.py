"""The error of a record that a state dict carries, and that nothing of this package has written."""

from __future__ import annotations


class RecordError(ValueError):
    """A record says what nothing of this package leaves behind; the network was not changed."""
