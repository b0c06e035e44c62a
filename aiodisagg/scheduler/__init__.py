"""Pure policies: what is encoded where. No clock, no I/O; the services ask, the simulator can ask the same."""
