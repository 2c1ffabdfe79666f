"""What it costs that a worker's fast memory is too small for its experts: figures and rules on plain arrays.

memory      WorkerMemory: what one worker's tiers hold, and how long an expert takes from each
activity    how often an expert has tokens in a step, and how much the slowest worker waits longer than the others
choice      which experts a worker keeps in its device and in its host memory

optimizer/core/tiering.py applies them to a PlacementProblem. What a cache does inside of a step is in
optimizer/buffering.
"""
