"""Faults under load, on a real server. `make chaos` runs them all."""
