"""pyzmq keeps one thread with a context of its own for the whole process from its first send without a copy."""

import gc

import zmq

zmq.Frame(b"", copy=False)
gc.freeze()  # ``no_leaks`` collects garbage around each test: not what torch and its friends have made on import
