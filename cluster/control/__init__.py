"""The control plane without its processes: events in, commands out. Each fact has one owner.

state         ControlState: passes each event on to those whom it concerns
owners        the owners of the facts, together
losses        workers that fail or leave with their nodes
transitions   how changes begin and end, and what that means for other owners
upkeep        brings the cluster to what it should be
change        one change of the epoch, from its transfer to its commit, or back
rebalancing   asks a planner, and carries out its plan
undoing       goes back from re-placements that have made steps longer
scaling       how many workers there should be, by request or by the autoscaler
draining      workers that leave, and the time that their requests get
starting      workers that die while they load
succession    the hand-over from one cluster to the next

Decisions are functions of the facts and of the time (cluster/decisions/, and beside each owner).
"""
