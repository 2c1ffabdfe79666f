"""The planner `ilp`: mixed-integer programs with the true cost model.

planner      the planner: exact for small problems, piece by piece for large ones
joint        the whole problem as one program
joint_sets   the sets of that program, and how large it would be
tiers        which experts lie in fast memory, in both programs
layer        one layer and a few of its workers as a program

The local search that it starts from is in optimizer/search; solvers are run by optimizer/core/solvers.py.
"""
