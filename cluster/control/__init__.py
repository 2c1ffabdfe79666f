"""The decisions of the control plane. Events in, commands out; pure functions of the facts and of the time.

state         ControlState: passes each event to the owners of the facts that it is about
reconcile     compares the cluster with what it should be: which workers to start, and which serve
change        one change of the epoch, from its transfer to its commit, or back
rebalancing   when to ask a planner, and whether to carry out its plan
scaling       how many workers there should be, by request or by the autoscaler
autoscaling   the autoscaler's rule
draining      workers that leave, and the time that their requests get
starting      workers that die while they load
status        readiness, and the progress of an operation
"""
