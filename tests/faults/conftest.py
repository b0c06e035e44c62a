"""Prepares for ``no_leaks``, which collects garbage around each test and looks for what is left."""

import gc

import zmq

from . import pair  # noqa: F401 - with all that it imports, torch above all

zmq.Frame(b"", copy=False)  # pyzmq keeps one thread with a context of its own from its first send without a copy
gc.collect()
gc.freeze()  # not what was made on import
