"""Criteria of importance: each scores weights or channels by its own formula."""
