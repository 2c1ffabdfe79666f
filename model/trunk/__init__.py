"""What a decoder layer computes beside its experts, for a step that packs the tokens of many sequences into one row.

    attention        attention for transformers' interface, by matrix products or by the fastest available code
    attention_path   which code computes attention, and the shapes that decide it
    flash            attention by torch's variable-length FlashAttention, on CUDA
    indexer          chooses the keys that tokens attend to, for sparse attention (DSA)
    kv_cache         blocks of keys and values of each layer
    windows          layers with a sliding window, whose blocks are a pool of their own
    latent           attention over latents, of which keys and values are made (MLA)
    linear           linear layers with packed matrices
    tied             a matrix that is embedding and output layer, packed
    output_head      logits of any tokens of the last step
    step_batch       which tokens of the step that is being run belong to which sequence, and where its keys lie
    rotation         rotary embeddings that depend on a sequence's length

The room leaves the choice of the code to model/fitting/, and the assignment of blocks to the scheduler.
"""
