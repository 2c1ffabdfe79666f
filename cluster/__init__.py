"""The control plane as pure values: no Ray, no torch, no clock. A room imports only from those above it:

    (this folder)   errors, the configuration, placements, and small values that several rooms share
    messages/       every message that processes send one another, a module for each conversation
    facts/          what the control plane knows at one moment, and the small computations on it
    decisions/      what is decided from the facts and the time
    control/        ControlState: events in, commands out; the owners of the facts

errors          what can go wrong, and which HTTP status or exit code it becomes
config          every setting of the server, from flags or YAML
setting         how a setting is declared, and how its value is checked
redeploy        which settings a serving cluster can take over, and which need another cluster
placement       which worker serves which expert, and in which tier: the value, its checks, its JSON
expert_forms    the forms in which a worker keeps experts
fit             which code serves a model on a worker, as a report
nodes           where workers may run, and what they wait for
peers           who sent a request, and to which name
keys            keys of the API
lines           text for one line of a log, a terminal or an error message
interpreter     the command of another Python with the same modules; imports without garbage collections
"""
