"""The tasks of the command `lightning-compress`, as functions with plain arguments."""
