"""Which experts of a layer stay in a cache that is too small for all of them: the policies, and their simulation.

interface   what a policy is asked
policies    those that a server can run, by name
lifo        inactive experts first, then last in, first out (Huang et al.)
lru         the expert that was used least recently
lfu         the expert that was used in the fewest steps
lfru        recency and frequency together: the default
static      the expert that was used least in a profile; such a cache hardly changes
belady      the fewest misses that any policy can have: offline only, for comparison
dealing     which worker fetches an expert that no worker has in memory
replicas    which replica computes the tokens of a step whose choices are known
simulate    a policy on the steps of a trace: accesses and hits

The caches that hold weights are in model/tiers; they ask the same policies.
"""
