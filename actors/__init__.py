"""The Ray actors, and what they share. The order of the rooms; a room imports only from those above it:

(this folder)  names of actors, time-outs (liveness), log lines, a watch over event loops, how a cluster ends,
               planners in processes that end, helper processes that stand still, and what Ray runs in no actor (tasks)
forkserver/    forks the processes of Ray's workers from two that have imported what they need
remote/        typed calls to actors; connections for steps, requests and tokens
caches/        what the scheduler knows of each worker: KV blocks and running requests; pure
scheduler/     which request runs on which worker in the next step; pure
telemetry/     traces of requests and operations
worker/        the actor around one worker's model
engine/        the actor that has the queue and runs the steps
coordinator/   the coordinator, which runs the control plane, and the migrator
"""
