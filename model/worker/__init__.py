"""One worker's data plane: it loads its share of a model, changes epochs, and runs steps.

    data_plane       the epoch in force, and a step from its plan to its result
    loaded_model     loads the trunk and the first experts, and makes the caches
    memory           how much of the worker's memory experts and caches get
    budgets          the same, as functions of numbers of bytes
    cache_room       divides the caches' part: KV blocks, states, snapshots
    held_experts     the experts in the device, and what becomes of those that come and go
    expert_sources   experts from the checkpoint, and copies from other workers
    groups           the doors by which workers of a group find one another
    cores            how many threads a step uses
    sequences        tokens, blocks and sampling states of the worker's sequences
    runner           one step of the trunk
    tracing          records the routing of a model without a cluster

The room leaves processes, connections and Ray to actors/worker/, and the plan of each step to actors/scheduler/.
"""
