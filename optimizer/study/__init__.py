"""Studies of planners without a cluster: traces, simulations, comparisons and figures.

traces     routing traces: reading, checking, cutting, counting
generate   traces with the statistics of a real model, at any size
scenario   from a trace and a description of a cluster to a problem
metrics    what a placement does to a trace, token by token
compare    every planner on one problem, judged on other tokens
simulate   the production code on a virtual clock
figures    figures of comparisons and simulations

The command line for them is in deploy/cli.
"""
