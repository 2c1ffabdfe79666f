"""Every message that processes send one another, a module for each conversation.

Values only: frozen, slotted, keyword-only dataclasses. What travels by Ray is pickled; what travels over our own
connections (actors/remote/codec.py) is encoded and checked by msgspec.

requests  API and engine
steps     engine and workers
seats     a worker's end of plans, which say only what changes
epochs    coordinator and workers
views     what coordinator and engine report, for /admin and /metrics
columns   numbers of many sequences in a row, as bytes
grammars  what an answer must look like
scores    log probabilities of prompts, packed
"""
