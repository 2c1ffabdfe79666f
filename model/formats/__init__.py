"""Reads weights as published checkpoints pack them: in 8 and in 4 bits, with scales.

    interface      Format, the interface to one way of packing, and the errors of its tensors
    configuration  config.json's quantization_config: which formats a checkpoint has, and which modules are left alone
    small_floats   what the small numbers mean: E2M1, E8M0, and two numbers in a byte
    bytes8         FP8 by blocks, by channel and by tensor, MXFP8, and INT8
    floats4        MXFP4 and NVFP4
    integers       INT4 and INT8 in groups, as compressed-tensors packs them
    awq            INT4 as AutoAWQ packs it
    gptq           INT4 and INT8 as GPTQ's tools pack them

A format knows shapes and values only. Finding the tensors in files is left to model/checkpoints/packed.py.
"""
