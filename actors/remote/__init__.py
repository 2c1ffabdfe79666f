"""How processes talk to one another.

ask          typed calls to Ray actors, the only place that uses their handles
ray_nodes    what Ray knows of its nodes
generations  the clusters that there are on one Ray
key_value    Ray's key-value store
saving       keeps a value there, of which most stays the same from one save to the next
background   tasks that nobody waits for
addresses    which address of its node a process listens at
calls        time-outs and errors of such calls
codec        the bytes of messages on our own connections
links        the end of a connection that an event loop serves
door         a listener, with a thread of its own, for connections that another thread serves
handshakes   connections that have not shown their token yet
"""
