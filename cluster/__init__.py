"""The control plane as pure values: no Ray, no torch, no clock.

errors      what can go wrong, and which HTTP status or exit code it becomes
config      every setting of the server, from flags or YAML
placement   which worker holds which expert: the value, its checks, its JSON
protocol    every message that processes send one another
routing     counts of tokens per layer and expert, over a sliding window
state       ControlState: events in, commands out
"""
