"""Steps of a worker that the GPU launches as recorded CUDA graphs, since the CPU needs longer to launch their kernels.

    decode_graphs   steps with one token of each sequence, attention included
    token_graphs    steps with prompts, and of models whose attention has no kernel for single tokens
    recordings      the recordings of all sizes, and the memory in which they find a step

How a step is recorded in pieces is in model/graph_pieces.py. The room leaves to model/worker/runner.py which steps it
serves.
"""
