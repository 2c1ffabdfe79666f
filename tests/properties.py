"""How many examples of a property are tried: as many as it asks for, or few under `--hypothesis-profile=quick`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import is_hypothesis_test, settings

QUICK = "quick"

settings.register_profile(QUICK, max_examples=10, deadline=None)


def most(examples: int) -> int:
    """`examples`, or those of the quick profile where it is in force and has fewer."""
    if settings.get_current_profile_name() != QUICK:
        return examples
    return min(examples, settings.get_profile(QUICK).max_examples)


def limit(test: Callable[..., Any]) -> None:
    """Make a test of a property keep to `most`: what its own decorator says would win over the profile."""
    if is_hypothesis_test(test):
        # no public way leads to the settings of a decorated test
        given: Any = getattr(test, "__func__", test)
        own = given._hypothesis_internal_use_settings
        given._hypothesis_internal_use_settings = settings(own, max_examples=most(own.max_examples))
