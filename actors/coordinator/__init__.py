"""The control plane's actors: they watch the cluster, and carry out what cluster/control decides.

start          starts and stops the coordinator's actor, from a process that is connected to Ray
coordinator    the actor: answers questions, takes requests, opens the checkpoint or a saved state
control_loop   feeds events to ControlState and has its commands carried out
opening        the settings that follow from the checkpoint and the machines
polling        asks workers and the engine for a sign of life and for statistics
executor       carries out commands on the actors, and returns their outcomes as events
transferring   brings experts to workers: copies by the migrator, and reads from the checkpoint
migrator       the actor that copies experts from worker to worker
planning       asks a planner, in another process, for a better placement
processes      the handles of the engine, the migrator and the workers
fleet          makes and ends actors through Ray; tests bring a fleet without Ray
views          what the coordinator reports: views for the admin API, and log lines
"""
