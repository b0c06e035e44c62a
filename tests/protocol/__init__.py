"""Tests of the pure core, driven by event lists and by a world in virtual time."""
