"""Accelerator memory: the runtime's calls, copies beside the computing, pools that other processes can open."""
