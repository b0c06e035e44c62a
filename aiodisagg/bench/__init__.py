"""``aiodisagg bench``: measurements on real processes, each against an undisturbed run beside it."""
