"""A laboratory of hosts on one machine, and what the server does when hosts, links and names fail.

lab       hosts: namespaces of their own on a bridge; a host can be cut off, slowed down and killed
cluster   a Ray cluster whose nodes are such hosts, and a server on it
streams   streams that note when each piece came, and how they ended
"""
