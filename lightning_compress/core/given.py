"""Numbers that a user passes: finite and in range, and neither text nor a truth value."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def real_number(
    value: Any,
    says: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """Return a number between two limits, finite by default.

    Args:
        value: What the user passed.
        says: What the argument is, and its range, for the error: "amount is the fraction to remove, 0 to 1".
        least: The smallest number.
        above: The number must be larger than this one.
        most: The largest number.
        below: The number must be smaller than this one.
        infinite: Whether it may be infinite.

    Raises:
        ValueError: It is outside, infinite or NaN, or is no number: text, or True and False, which Python would count.

    Example:
        >>> real_number(1, "amount is a share, 0 to 1", least=0, most=1)
        1.0
        >>> real_number("0.5", "amount is a share, 0 to 1", least=0, most=1)
        Traceback (most recent call last):
        ValueError: amount is a share, 0 to 1; got the text '0.5'.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refused(value, says)
    found = float(value)
    inside = least <= found <= most and (found > above or above == -math.inf) and (found < below or below == math.inf)
    if not inside or not (infinite or math.isfinite(found)):
        raise _refused(value, says)
    return found


def whole_number(value: Any, says: str, *, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number between two limits, both included.

    Raises:
        ValueError: It is outside, or is none, such as 2.0, text or True.

    Example:
        >>> whole_number(3, "n_batches is a whole number, 1 or more", least=1)
        3
        >>> whole_number(2.0, "n_batches is a whole number, 1 or more", least=1)
        Traceback (most recent call last):
        ValueError: n_batches is a whole number, 1 or more; got 2.0.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refused(value, says)
    found = int(value)
    if (least is not None and found < least) or (most is not None and found > most):
        raise _refused(value, says)
    return found


def flag(value: Any, name: str) -> bool:
    """Return a truth value, or raise a ValueError: text such as "false" would count as True.

    Example:
        >>> flag("false", "noise")
        Traceback (most recent call last):
        ValueError: noise must be True or False; got the text 'false'.
    """
    if not isinstance(value, bool):
        raise _refused(value, f"{name} must be True or False")
    return value


def _refused(value: Any, says: str) -> ValueError:
    return ValueError(f"{says}; got {'the text ' if isinstance(value, str) else ''}{value!r}.")
