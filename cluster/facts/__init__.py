"""What the control plane knows, and the small computations on it.

facts        everything that is known at one moment, as one frozen value, and who owns each part
events       what happens to the control plane, and the commands that it answers with
membership   every worker, and the experts that it has
homes        the nodes that workers may run on, and which of them are new
links        what is known of the links between workers, from rates between pairs of them
adaptation   what follows from a set of workers: slots, the placement that moves the fewest experts, the transport
tiering      which experts lie in a worker's device, and how a placement's tiers are reached in steps
transfers    the experts to bring before an epoch can begin
routing      tokens per layer and expert over a sliding window, and how uneven they make the load
sampling     a sample of tokens with their experts, from which transitions are estimated
operations   the record of operations, each with its reason
counters     totals for /metrics
"""
