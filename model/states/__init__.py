"""Layers that keep a state per sequence besides keys and values: linear attention, Mamba, short convolutions.

finding   finds these layers in a model, and what each of them keeps, by running the model
store     the states of one worker: those of running sequences, and snapshots
packed    runs such a layer over the packed tokens of a step
rules     replaces functions of transformers' modelling files that such layers call
recurrent single tokens of many sequences in the native library

transformers' own code computes the layers. It runs on one sequence, or on sequences of one token each, at a time.
"""
