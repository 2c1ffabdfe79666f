"""Layers that keep a state per sequence besides keys and values: linear attention, Mamba, short convolutions.

finding    finds these layers in a model, and what each of them keeps, by running the model
store      the states of one worker: those of running sequences, and snapshots
batch      which tokens of a step belong to which sequence, and the slots of their states
packed     runs such a layer over the packed tokens of a step
block      such a layer as one native call
rules      replaces functions of transformers' modelling files that such layers call
recurrent  single tokens of many sequences, and scans over the tokens of one, in the native library

A layer that is not one native call is computed by transformers' own code, which runs on one sequence, or on sequences
of one token each, at a time.
"""
