"""Which request runs on which worker in the next step. Pure: no clock, no Ray, no torch.

scheduler          plans steps, and commits or rolls back their results
request_book       which requests there are, and whether a new one is accepted
fair_queue         the waiting requests, in which clients take turns
continuing         decides which running requests go on in a step, and gets them blocks
prefill_pace       how many prompt tokens run beside decodes
admission          decides which worker a waiting request runs at, and which running one makes way
flights            a step in flight, and the answers to it
landing            takes the answers: tokens are appended, ends are noticed, outputs are made

What it knows of each worker is in actors/caches/.
"""
