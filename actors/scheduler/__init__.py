"""Which request runs on which worker in the next step. Pure: no clock, no Ray, no torch.

scheduler          plans steps, and commits or rolls back their results
rows               all running requests as columns, so that those which go on decoding cost a step nothing each
flights            a step in flight, the answers to it, and what comes of them
admission          decides which worker a waiting request runs at, and which running one makes way
fair_queue         the waiting requests, in which clients take turns
running_requests   one request: its tokens, its blocks, and its steps in flight
worker_caches      one worker's KV blocks and running requests
snapshots          the snapshots of states that one worker keeps
windows            the blocks of layers with a sliding window
kv_blocks          the blocks of one worker: free, in use, or found again by their tokens
"""
