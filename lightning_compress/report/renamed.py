"""Renamed keys and functions in configs and reports: their earlier names and the current ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Dotted keys. The key of a technique is the name of its file in conf/compress.
KEYS = {
    "callbacks.pruning": "callbacks.iterative_pruning",
    "callbacks.clustering": "callbacks.weight_clustering",
    "callbacks.qat": "callbacks.quantization_aware_training",
    "callbacks.binary": "callbacks.binary_weights",
    "wrappers.distillation.cache": "wrappers.distillation.index",
}
TARGETS = {
    "lightning_compress.distillation.finding.load_teachers": (
        "lightning_compress.distillation.teacher_sources.load_teachers"
    ),
}


def translated(settings: Any, *, keep: Iterable[str] = (), prefix: str = "") -> Any:
    """Return the settings of a run with earlier names replaced by the current ones.

    A key keeps its earlier name where the settings contain the new name as well.

    Args:
        settings: Nested dicts and lists.
        keep: Dotted keys that are not renamed, because the user's own callbacks have them.
        prefix: Dotted key of `settings` in the whole config, with a dot at its end.

    Example:
        >>> translated({"callbacks": {"pruning": {"amount": 0.5}}})
        {'callbacks': {'iterative_pruning': {'amount': 0.5}}}
    """
    if isinstance(settings, list):
        return [translated(one, prefix="[]") for one in settings]
    if not isinstance(settings, dict):
        return settings
    found: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        new = KEYS.get(dotted, dotted).removeprefix(prefix)
        if new != key and (dotted in keep or new in settings):
            new = key
        moved = TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else value
        found[new] = translated(moved, keep=keep, prefix=f"{dotted}.")
    return found


def refusal(command_line: Iterable[str]) -> str:
    """Return a line for every override of a command line that uses an earlier name, or an empty string.

    Example:
        >>> refusal(["callbacks.qat.weight_bits=4"])
        'callbacks.qat is called callbacks.quantization_aware_training now: callbacks.qat.weight_bits=4 is refused.'
    """
    words = [word for word in command_line if not word.startswith("-")]
    keys = {word: word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words}
    lines = []
    for word, key in keys.items():
        old = next((old for old in KEYS if key == old or key.startswith(f"{old}.")), None)
        # A user may add a callback under any name: +callbacks.qat={_target_:mine.Callback}.
        if old is not None and not any(_adds(one, old) for one in words):
            lines.append(f"{old} is called {KEYS[old]} now: {word} is refused.")
    return "\n".join(lines)


def _adds(word: str, key: str) -> bool:
    return word.startswith((f"+{key}._target_=", f"++{key}._target_=")) or (
        word.startswith((f"+{key}=", f"++{key}=")) and "_target_" in word
    )
