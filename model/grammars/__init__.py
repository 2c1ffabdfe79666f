"""Structured output: which tokens a request's grammar allows next, by llguidance. Without torch. The modules:

    vocabulary         the model's tokens, as llguidance needs them
    sources            a request's grammar in llguidance's language
    structural_tags    the same for vLLM's structural tags
    finite             finds schemas that no finite JSON value satisfies
    ranges             finds ranges of numbers that llguidance gets wrong
    compiling          compiles grammars within limits; the compiled ones of a worker
    progress           one sequence's place in its grammar
    masks              computes the masks of a step in threads, while the model runs

A grammar's state is not stored anywhere: it follows from the tokens of a sequence, so it is the same on any worker and
after any recovery.
"""
