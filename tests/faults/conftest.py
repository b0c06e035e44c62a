"""pyzmq keeps one thread with a context of its own for the whole process from its first send without a copy."""

import zmq

zmq.Frame(b"", copy=False)
