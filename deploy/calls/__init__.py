"""Verbs of the command line that call a running server over HTTP, and change it."""
