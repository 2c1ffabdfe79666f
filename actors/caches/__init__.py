"""What the scheduler knows of each worker: its KV blocks, and how far the requests are that run there. Pure.

worker_caches      all workers, in rank order
worker_cache       one worker's KV blocks and running requests
running_requests   one request: its tokens, its blocks, and its steps in flight
rows               all running requests as columns, so that those which go on decoding cost a step nothing each
snapshots          the snapshots of states that one worker keeps
windows            the blocks of layers with a sliding window
kv_blocks          the blocks of one worker: free, in use, or found again by their tokens

Which request runs where, and when, is decided in actors/scheduler/.
"""
