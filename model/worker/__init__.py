"""One worker's data plane: it loads its share of a model, changes epochs, and runs steps.

    worker         weights, KV cache, sequences and the epoch in force
    runner         one step of the trunk
    sampling       chooses the next token of each sequence
    token_counts   counts of a sequence's tokens, for penalties
    tracing        records the routing of a model without a cluster

The room leaves processes, connections and Ray to actors/worker/, and the plan of each step to actors/scheduler/.
"""
