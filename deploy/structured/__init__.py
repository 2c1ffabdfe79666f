"""Structured output: makes the grammar that a request's fields ask for."""
