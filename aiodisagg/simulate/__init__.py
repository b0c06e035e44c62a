"""The same policies in virtual time: what a cluster would do, without one. Pure and seeded; no loop, no sockets."""
