"""The data plane in torch, without Ray. The order of the rooms; a room imports only from those above it:

    (this folder)  int8, int4, staging, heap; torch_private and transformers_private hold all uses of private functions
    native/        kernels in C++ for bfloat16 on CPU
    trunk/         attention over the paged KV cache, packed linear layers, rotary embeddings
    formats/       reads packed weights: FP8, INT4, AWQ, GPTQ, MXFP4 and others
    checkpoints/   opens a model directory, checks that it can be served, loads the trunk or single experts
    experts/       the experts that a worker holds, and their products
    exchange/      carries tokens to the workers of their experts and back; counts routing
    fitting/       chooses the code that serves each part of a model on this machine
    worker/        one worker: loading, epochs, steps, sampling

The life of a step: `Worker.step` (worker/worker.py) turns a StepPlan into slices of tokens. `ModelRunner.run`
(worker/runner.py) packs them into one row and runs transformers' trunk. In each layer, attention (trunk/attention.py)
writes keys and values to the KV cache and reads them (trunk/kv_cache.py). The router chooses experts. The dispatcher
(exchange/dispatch.py) sends each token to the workers of its experts, where an ExpertStore (experts/store.py) computes
them, and adds up the partial sums that come back. `fit` (fitting/fit.py) may have replaced any of these parts by native
calls. `sample` (sampling/sampling.py) chooses the next tokens, and the worker returns them as a StepResult.
"""
