"""The engine: the actor that has the queue of requests and runs the steps of all workers.

engine          the actor: answers the control plane's calls
step_loop       plans, sends and commits steps, and flips epochs between them
worker_links    the connections to the workers
clients         the connections to API replicas, and the outputs that they have not got yet
lasting         requests that outlive the API replicas which submitted them
step_deadline   how long a step may take before it counts as late
"""
