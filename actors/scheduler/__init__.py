"""Which request runs on which worker in the next step. Pure: no clock, no Ray, no torch.

scheduler          plans steps, and commits or rolls back their results
rows               all running requests as columns, so that those which go on decoding cost a step nothing each
flights            a step in flight, the answers to it, and what comes of them
request_book       which requests there are, and whether a new one is accepted
continuing         decides which running requests go on in a step, and gets them blocks
landing            takes the answers to a step
admission          decides which worker a waiting request runs at, and which running one makes way
fair_queue         the waiting requests, in which clients take turns
running_requests   one request: its tokens, its blocks, and its steps in flight
worker_caches      the workers, and the KV blocks and running requests of each
snapshots          the snapshots of states that one worker keeps
kv_blocks          the blocks of one worker: free, in use, or found again by their tokens
"""
