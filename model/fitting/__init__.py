"""Chooses the code that serves each part of a model on this machine, and puts it in place.

    fit              makes every choice, and reports it with its reasons
    probe            finds the shapes of a trunk's layers
    latents          caches latents in place of keys and values
    small_ops        routers as native calls or kernels, and by model/operators/ norms and rotary embeddings
    scored_routers   recognises routers that choose by scores and a bias
    attention_half   the attention half of a layer as one native call
    halves           what the kinds of attention halves have in common
    latent_half      the same for layers that attend to latents
    feed_forward     router, experts and shared expert as one native call
    state_layers     layers that keep states, for packed tokens; single tokens by native calls alone
    whole_stack      all layers of a trunk as one native call
    straight         a trunk's parts without transformers' code around them

Modules are recognised by what they compute in a trial and not by their names. The room leaves the code itself to
model/native/, model/trunk/, model/experts/ and model/exchange/.
"""
