"""The Lightning glue that the techniques share: it decides when a technique acts, never what it does."""
