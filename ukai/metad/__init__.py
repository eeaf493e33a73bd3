"""metad: the metadata of the cluster, on one node.

``server`` has the sockets and the clock, ``store`` the database; all the others are decisions without I/O.
"""
