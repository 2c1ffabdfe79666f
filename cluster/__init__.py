"""The control plane as pure values: no Ray, no torch, no clock.

errors      what can go wrong, and which HTTP status or exit code it becomes
config      every setting of the server, from flags or YAML
placement   which worker holds which expert: the value, its checks, its JSON
messages    every message that processes send one another, a module for each conversation
routing     counts of tokens per layer and expert, over a sliding window
events      what happens to the control plane, and the commands it answers with
state       ControlState: events in, commands out; decides what should be
epochs      the life of a change: transfer, prepare, commit, or back
membership  workers as the control plane knows them; which placement and transport follow from who is there
transfers   what must be copied or read before an epoch can begin
operations  the record of operations, each with its reason
invariants  what always holds of a ControlState; tests check it after every event
"""
