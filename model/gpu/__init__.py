"""Kernels for CUDA GPUs, in Triton, for what torch computes in many small ones.

    refusals    why the kernels do not serve a dtype or a device
    rows        root mean square norms, rotary embeddings, gates
    router      the choice of experts
    pairs       brings rows to their experts' order, and adds up what the experts return
    stacks      the matrices of experts, as kernels read them
    packed      unpacks packed experts
    few         experts of few rows
    few_packed  packed experts of few rows
    grouped     packed experts of some rows each
    decode      attention of one query row per sequence over a paged cache

Triton comes with every torch for CUDA. It is imported only where a kernel is used, since torch for CPUs has none. The
room leaves to model/fitting/ which modules get a kernel.
"""
