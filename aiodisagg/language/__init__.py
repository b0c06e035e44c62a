"""The language peer: planning, placement, the receiving side of the protocol, and the engine."""
