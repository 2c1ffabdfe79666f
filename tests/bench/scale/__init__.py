"""How the control path grows: the real engine and coordinator with simulated workers, up to 256 of them.

fleet     processes of simulated workers, which answer over the real wire when a device would have
engine    the engine's scheduler, loop and clients in a process, and what a step costs it
client    a process that submits requests as an API replica does, and reads their tokens
control   the coordinator and its state machine with workers that only pretend, at 58 layers of 256 experts
api       API replicas as they are, with an engine that makes tokens at a steady pace
report    the tables, the exponents and the plot

make bench-scale runs `__main__`.
"""
