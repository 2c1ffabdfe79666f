"""The actor around one worker's model.

worker_actor   the actor: loads the model, and answers the control plane's calls
step_server    the thread that runs the engine's steps in order
"""
