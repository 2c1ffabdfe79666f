"""How processes that share a GPU write into one another's memory there.

    transport   all-to-all between them
    memory      the memory of a group on one rank, and where messages lie in it
    signals     the words by which ranks tell each other how far they are
    watch       ends the waits of a group that has failed, and frees its memory
    parcels     experts on their way between workers of one GPU
    driver      the functions of the CUDA driver that this needs

The room leaves joining a group to model/exchange/device_joining.py.
"""
