"""Forks Ray's workers from processes that have imported what they need: one Ray, Serve and the API's code, and one, a
fork of that, PyTorch, transformers and the model's code as well.

These imports take 60 MB and a second of a core, and for workers that compute 270 MB and two to four seconds. Forks
share what they do not write to. Ray starts `launcher` in place of Python (its `py_executable`). The launcher finds the
node's fork server, or starts it, and hands its arguments, environment and descriptors over to a fork, which becomes
Ray's worker. Whatever fails on the way, the launcher becomes the worker itself, as it would without all this.
"""
