"""Text to tokens and back.

tokenizer           the model's tokenizer: ids, chat templates, names and bytes of single tokens
tokenizer_process   a process that renders and encodes within limits of time and memory
prompts             hands prompts to such processes
texts               the texts of one API replica, each by the way that holds up no stream
conversation        a request's messages in the form that the model's chat template takes
grammar_check       compiles a grammar before its request is accepted
detokenizer         from token ids to text, one token at a time, and stop strings
byte_detokenizer    the same for tokens that are bytes

Routes are in deploy/api; nothing here knows HTTP or the cluster.
"""
