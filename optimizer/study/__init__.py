"""Studies of planners without a cluster: traces, simulations, comparisons and figures.

traces         routing traces: reading, checking, cutting, counting
generate       traces with the statistics of a real model, at any size
scenario       from a trace and a description of a cluster to a problem
mixes          the statistics of several traces together
graded         placements from the most even load to the most uneven one
metrics        what a placement does to a trace, token by token
compare        every planner on one problem, judged on other tokens
simulate       the production code on a virtual clock
steps          the decoding steps of a server, cut from a trace
caches         a trace through caches of experts: miss rates and waiting times
figures        figures of comparisons and simulations
cache_figures  figures of caches: miss rates and latency

The command line for them is in deploy/cli.
"""
