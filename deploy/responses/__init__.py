"""OpenAI's Responses API without its routes: items and messages, records and where they are kept, tokens and events.

A background response is kept as a record in Ray's key-value store, and as a lasting request in the engine. So any API
replica can follow it, and show the same events of it.

    body -> items.py: messages -> a chat's prompt -> Record -> store.py
    engine -> tokens -> following.py -> rendering.py: events and output items -> the record
"""
