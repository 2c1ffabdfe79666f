"""Experts that do not fit in a worker's memory: they lie on the disk, and come when a step needs them.

    records   one expert in one file, with a digest: reading, checking and writing
    disk      the disk tier: records, and the checkpoint where there is none
    readers   the threads that read, those experts first that a step waits for
    slots     the memory of the cache area
    area      the cache area: which experts are in it, which come, and which leave
    tiers     all of it for one worker
    rates     how fast the disk is

Where every expert fits, none of this is made.
"""
