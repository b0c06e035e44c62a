"""The pure core: who holds which rows, who may write where, and what happens next. No I/O, clock or randomness."""
