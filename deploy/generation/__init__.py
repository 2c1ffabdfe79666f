"""The life of a request in the API: its place among those that wait, its answer, its times.

places            places for requests that wait
answer            from tokens to text, up to the end of the answer
shortcut          single tokens past all tasks to the connection
progress          what is counted of one answer while it is made
prompt_logprobs   writes the log probabilities of a prompt
life              the times of one request
metrics           Prometheus metrics: what this replica counts
token_counts      tokens and the times between them, counted fast
cluster_metrics   the same of the cluster, of what its groups answer
counts            what all replicas have counted together

HTTP is in deploy/api; the way to the engine is in deploy/backend.
"""
