"""Request bodies: from bytes to validated values, within bounds of size and time.

bodies      reads a body with a limit on its size
json_text   decodes JSON, with an error in words
bounds      limits of fields, which are checked before validation
base        the base of the pydantic models below
schema      the fields of every call; `parse` validates a body
messages    those of the messages of a chat
structured  those of structured output
tools       those of tools and tool calls
responses   those of /v1/responses
unknown     names of fields that are ignored, for the log
faults      a validation error in words: which field, what was expected, what came
aside       another process for large bodies and long texts, so that no stream waits for them

What the values mean, and whether the model can serve them, is decided in deploy/api.
"""
