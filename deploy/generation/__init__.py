"""The way of a request from the API to the engine, and of its tokens back.

backend          the interface of the API to the cluster
ray_backend      that interface on Ray: it finds the coordinator and the engine, and resumes requests after a loss
gcs_watch        whether Ray's GCS answers, without which Ray ends processes
request_stream   a running request: the tokens that it has, and those that nobody has read yet
answer           from tokens to text, up to the end of the answer
metrics          Prometheus metrics of this replica and of the cluster

HTTP is in deploy/api; the engine is in actors/engine.
"""
