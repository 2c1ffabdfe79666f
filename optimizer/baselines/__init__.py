"""Planners from the literature and simple rules. They are baselines for comparison, and starting points of our own.

quick          the planners that need no solver and no deadline, by name
heuristics     contiguous, round robin, random, greedy, and greedy with co-active experts apart
pinning        greedy, with the experts pinned that are chosen most often
eplb           DeepSeek's expert-parallel load balancer
load_ilp       the min-max load ILP of one layer, as a model
load_planner   the planner `load_ilp`: that model for every layer
moetuner       MoETuner's two ILPs
replicas       how many replicas each expert gets

Our own planners are in optimizer/search, optimizer/ilp and optimizer/auto.py.
"""
