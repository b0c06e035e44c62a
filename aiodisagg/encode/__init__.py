"""The encode peer: vision tower, sources, and the sending side of the protocol."""
