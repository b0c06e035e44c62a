"""Continuous batching over a paged KV pool: pure scheduling, the attention function, sampling and the step thread."""
