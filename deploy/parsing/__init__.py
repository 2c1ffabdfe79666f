"""What a model writes, taken apart: reasoning, content and tool calls.

events       what the parser says, in the order of the text
regions      finds the markers of a response template in a text that comes in pieces
calls        makes deltas of a call's arguments while the call is being written
readers      how a template's field of calls is read, and the types of its arguments
json_reader  JSON that comes in pieces
parser       from pieces of text to events
formats      the response templates of the families (families/*.json), and which of them a checkpoint has
grammars     grammars that make a model call a tool, or think first

A response template is transformers' form (`transformers.utils.chat_parsing`). Its own parser gives calls only when they
are complete, and keeps the whole text; this one streams, and takes time in proportion to the text. On a whole text both
say the same, which tests/deploy/parsing/test_parser.py holds. Nothing here knows HTTP, the engine or a tokenizer.
"""
