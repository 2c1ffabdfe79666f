"""The placement problem, its price, and what all planners share.

problem      PlacementProblem, the input of every planner
validate     the checks of its fields
estimate     estimates for statistics that were not counted
table        slot tables, the form in which planners build placements
cost         the price of a placement, itemised; the formulas
bounds       lower bounds on that price
tiering      which experts stay in fast memory, and how long workers wait for the rest
contract     the budget that a planner gets, and the draft that it returns
result       PlanResult, the output of plan()
solvers      one way to run a Pyomo model on HiGHS, CBC or Gurobi
assignment   the assignment problem
chaining     which worker takes which contents of the next layer, so that tokens stay

No planner is here.
"""
