"""Text to tokens and back.

tokenizer           the model's tokenizer: ids, chat templates, names and bytes of single tokens
tokenizer_process   a process that renders and encodes within limits of time and memory
prompts             hands prompts to such processes
texts               the texts of one API replica, each by the way that holds up no stream
conversation        a request's messages in the form that the model's chat template takes
detokenizer         from token ids to text, one token at a time, and stop strings

Routes are in deploy/api; nothing here knows HTTP or the cluster.
"""
