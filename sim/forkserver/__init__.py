"""A fork server: one warm process with the job's modules loaded, and every process of a simulation forked from it.

::

    warm.py     the launcher's handle: starts the warm process, has it load modules, ends it
    server.py   the warm process itself
    forked.py   a process between its fork and its function or command
    wire.py     what clients and server say to each other
    client.py   a connection, and the processes that were started through it
    spawner.py  the agent's hosts, forked
"""
