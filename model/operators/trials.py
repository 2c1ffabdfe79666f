"""What trials of modules have in common."""

from __future__ import annotations

OTHERWISE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""Errors that a trial call raises if the module expects other arguments."""
