"""Experts that do not fit in a worker's memory: they lie on the disk, and come when a step needs them.

    records   one expert in one file, with a digest: reading, checking and writing
    disk      the disk tier: records, and the checkpoint where there is none
    readers   the threads that read, those experts first that a step waits for
    slots     the memory of the cache area
    area      the cache area: which experts are in it, which come, and which leave
    way       how experts come into these slots
    host      pinned memory beside a GPU, and which experts of it the host's cores compute
    far       how experts come into the slots of a GPU
    link      copies between the host's memory and a GPU's, beside the steps
    tiers     all of it for one worker
    rates     how fast the disk is

Where every expert fits, none of this is made.
"""
