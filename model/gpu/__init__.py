"""Code for CUDA GPUs: kernels in Triton for what torch computes in many small ones, and decode steps as CUDA graphs.

    refusals    why the kernels do not serve a dtype or a device
    rows        root mean square norms, rotary embeddings, gates
    router      the choice of experts
    pairs       brings rows to their experts' order, and adds up what the experts return
    few         experts of few rows
    decode      attention of one query row per sequence over a paged cache
    small_ops   gives the kernels to the modules of a trunk that compute the same
    graphs      launches a whole decode step as one CUDA graph

Triton comes with every torch for CUDA. It is imported only where a kernel is used, since torch for CPUs has none.
"""
