"""The planner `local_search`: swaps and re-dealt replicas over all layers.

local_search   the search over all layers, and the planner
layer_prices   the cost model as one layer sees it while the others stay
fetches        what workers wait for experts that are not in their devices
swaps          what every swap of two slots of a layer would change
redeals        what giving a spare slot to another expert would change

The true cost is in optimizer/core/cost.py.
"""
