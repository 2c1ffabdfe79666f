"""Every message that processes send one another, a module for each conversation.

Values only: frozen, slotted, keyword-only dataclasses. What travels by Ray is pickled; what travels over our own
connections (actors/remote/codec.py) is encoded and checked by msgspec.

requests  API and engine
steps     engine and workers; seats is the workers' end of it
epochs    coordinator and workers
views     what coordinator and engine report, for /admin and /metrics
"""
