"""The data plane in torch, without Ray. The order of the rooms; a room imports only from those above it:

    (this folder)  what several rooms use: int8, int4, records of experts, copies to devices, block tables, the
                   formula of norms, how graphs are recorded in pieces; and all uses of private functions of torch
                   and transformers
    formats/       reads packed weights: FP8, INT4, AWQ, GPTQ, MXFP4 and others
    grammars/      which tokens a request's grammar allows next
    native/        kernels in C++ for bfloat16 on CPU
    gpu/           kernels in Triton for bfloat16 on GPUs
    operators/     recognises norms and rotary embeddings, and has them computed by other code
    sampling/      chooses the next token of each sequence, and scores prompts
    shared_gpu/    memory and signals of workers that share one GPU
    states/        layers that keep a state per sequence
    trunk/         attention over the paged KV cache, packed linear layers, rotary embeddings
    checkpoints/   opens a model directory, checks that it can be served, loads the trunk or single experts
    experts/       the experts that a worker holds, and their products
    exchange/      carries tokens to the workers of their experts and back; counts routing
    fitting/       chooses the code that serves each part of a model on this machine
    graphs/        launches steps as CUDA graphs
    tiers/         experts that lie on the disk or in the host's memory, and come when a step needs them
    worker/        one worker: loading, epochs, steps
    measuring/     measures steps of workers on this machine, for `emoe calibrate`

The life of a step: `DataPlane.step` (worker/data_plane.py) turns a StepPlan into slices of tokens. `ModelRunner.run`
(worker/runner.py) packs them into one row and runs transformers' trunk. In each layer, attention (trunk/attention.py)
writes keys and values to the KV cache and reads them (trunk/kv_cache.py). The router chooses experts. The dispatcher
(exchange/dispatch.py) sends each token to the workers of its experts, where an ExpertStore (experts/store.py) computes
them, and adds up the partial sums that come back. `fit` (fitting/fit.py) may have replaced any of these parts by native
calls. `choose` (sampling/next_tokens.py) chooses the next tokens, and the worker returns them as a StepResult.
"""
