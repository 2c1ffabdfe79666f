"""Carries tokens between workers in lock-step: to the workers of their experts, and partial sums back.

    dispatcher        what every dispatcher offers, and which replicas it uses
    dispatch          which rows go to which worker, over any transport
    native_dispatch   the same for workers of one node, in native code
    dealing           which worker computes an expert that lies in no memory
    transports        all-to-all by NCCL, and for a single worker
    tcp               all-to-all between nodes, over a connection for each pair
    meeting           how its workers find one another
    rates             how fast the links between them are
    shared_memory     all-to-all between processes of one node
    device_joining    joins processes of one GPU (model/shared_gpu/)
    join              chooses the exchange of an epoch and joins it
    counter           counts routing decisions

The room leaves the products to model/experts/, and the placement to the control plane.
"""
