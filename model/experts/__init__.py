"""The experts that one worker holds, and the weighted sums of their outputs.

    interface      LayerExperts, the interface to the experts of one layer
    cpu            experts on CPU, in the native library or by PyTorch
    stacked        experts on GPUs, in slots of stacked tensors
    tiered_stacks  the same, where some come when a step needs them
    unpacking      packed experts on GPUs, and how they are unpacked
    packed_trial   tries the kernels that read them
    rounding       rounds experts for GPUs, on the host
    store          all layers' experts of a worker, and the function by which the trunk calls them

The room leaves it to model/exchange/ which tokens come to these experts, and to the placement which experts are held.
"""
