"""metad: its decisions without I/O, its database, its sockets."""
