"""A peer that holds both halves: it encodes for itself and, with the slack its streams leave, for others."""
