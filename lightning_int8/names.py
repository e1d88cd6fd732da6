"""Layer names: free of what wrappers add to them, matched by the patterns users write, and collapsed for tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

_WRAPPER_SEGMENTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module"}
)


def strip_wrappers(name: str) -> str:
    """``name`` without the segments that ``torch.compile``, FSDP, activation checkpointing and Fabric insert."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name`` or a parent of it.

    A pattern is a glob over whole dotted segments and may start anywhere in the name: ``lm_head`` matches
    ``model.lm_head``; ``layers.1`` matches ``model.layers.1.mlp.up_proj`` but not ``model.layers.10``;
    ``layers.*.mlp`` and ``*_proj`` match as expected (``*`` also spans dots).
    """
    pattern = strip_wrappers(pattern)
    segments = strip_wrappers(name).split(".")
    return any(
        fnmatchcase(".".join(segments[start:stop]), pattern)
        for start in range(len(segments))
        for stop in range(start + 1, len(segments) + 1)
    )


def checked_patterns(ignore_modules: Iterable[str] | None) -> tuple[str, ...]:
    """The patterns of an ``ignore_modules``.

    Raises:
        TypeError: It is no list of non-empty strings.
    """
    if ignore_modules is None:
        return ()
    if isinstance(ignore_modules, str) or not isinstance(ignore_modules, Iterable):
        example = ignore_modules if isinstance(ignore_modules, str) else "lm_head"
        raise TypeError(f"ignore_modules={ignore_modules!r} must be a list of patterns, such as [{example!r}].")
    patterns = tuple(ignore_modules)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"ignore_modules={list(patterns)!r}: {pattern!r} must be a non-empty string.")
    return patterns


def check_patterns_match(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuses patterns that match none of ``names``, which are without what wrappers insert.

    Raises:
        ValueError: One matches nothing.
    """
    names = [name for name in names if name]
    for pattern in patterns:
        if any(matches(pattern, name) for name in names):
            continue
        close = near(pattern, names)
        hint = f"Names like it: {', '.join(close)}." if close else "Print model.named_modules() to see the names."
        raise ValueError(
            f"ignore_modules: the pattern {pattern!r} matches no module. {hint} Patterns match whole dotted segments, "
            "anywhere in a name."
        )


def near(pattern: str, names: Iterable[str], count: int = 5) -> list[str]:
    """The names (or parts of names) most like ``pattern``, best first; empty when none is close."""
    candidates: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        candidates[name] = None
        for start in range(len(segments)):
            candidates[".".join(segments[start:])] = None
    return difflib.get_close_matches(pattern, candidates, n=count, cutoff=0.6)


def collapse_indices(name: str) -> str:
    """``name`` with every numeric segment replaced by ``*``: what repeated layers have in common."""
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))
