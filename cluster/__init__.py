"""The control plane as pure values: no Ray, no torch, no clock.

errors        what can go wrong, and which HTTP status or exit code it becomes
config        every setting of the server, from flags or YAML
placement     which worker holds which expert: the value, its checks, its JSON
messages      every message that processes send one another, a module for each conversation
routing       counts of tokens per layer and expert, over a sliding window

The control state machine, from what it knows to what it does:

events        what happens to the control plane, and the commands it answers with
facts         what is known at one moment: the value that every decision is made from, and who owns which part of it
membership    owner of the workers
change        owner of the epoch in force and of the one change under way: transfer, drain, prepare, commit, or back
rebalancing   owner of the planner at work; when to ask one, and what to make of its answer
scaling       owner of the number of workers that there should be; what may be asked for
draining      owner of what the engine knows of workers that are to leave
starting      owner of the pause after workers that died while they loaded
reconcile     what should be, as against what is: whom to start, who is to serve
autoscaling   how many workers the load asks for
adaptation    slots, a placement that moves as little as possible, and a transport, from who is there
transfers     what must be copied or read before an epoch can begin
operations    the record of operations, each with its reason
counters      totals for /metrics
status        readiness, and how far an operation is
state         ControlState: passes events to the owners, and what one has done to the others
invariants    what always holds of a ControlState; tests check it after every event
"""
