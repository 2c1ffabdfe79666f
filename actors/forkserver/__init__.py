"""Forks workers from a process that has imported PyTorch, transformers and the model's code.

These imports take two to four seconds of a core and 270 MB, which forks share until they write to it. Ray starts
`launcher` in place of Python (its `py_executable`). The launcher finds the node's fork server, or starts it, and hands
its arguments, environment and descriptors over to a fork, which becomes Ray's worker. Whatever fails on the way, the
launcher becomes the worker itself, as it would without all this.
"""
