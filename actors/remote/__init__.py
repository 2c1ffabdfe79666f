"""How processes talk to one another.

ask          typed calls to Ray actors, the only place that uses their handles
addresses    which address of its node a process listens at
calls        time-outs and errors of such calls
codec        the bytes of messages on our own connections
links        the end of a connection that an event loop serves
door         a listener, with a thread of its own, for connections that another thread serves
handshakes   connections that have not shown their token yet
"""
