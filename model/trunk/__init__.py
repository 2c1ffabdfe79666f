"""What a decoder layer computes beside its experts, for a step that packs the tokens of many sequences into one row.

    attention        attention for transformers' interface, by matrix products or by the fastest available code
    attention_path   which code computes attention, and the shapes that decide it
    flash            attention by torch's variable-length FlashAttention, on CUDA
    kv_cache         blocks of keys and values of each layer
    linear           linear layers with packed matrices
    rotation         rotary embeddings that depend on a sequence's length

The room leaves the choice of the code to model/fitting/, and the assignment of blocks to the scheduler.
"""
