"""The life of a request in the API: its place among those that wait, its answer, its times.

places            places for requests that wait
answer            from tokens to text, up to the end of the answer
prompt_logprobs   writes the log probabilities of a prompt
life              the times of one request
metrics           Prometheus metrics: what this replica counts
cluster_metrics   the same of the cluster, of what its groups answer
counts            what all replicas have counted together

HTTP is in deploy/api; the way to the engine is in deploy/backend.
"""
