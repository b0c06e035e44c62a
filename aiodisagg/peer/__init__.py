"""What both kinds of peers are made of: the driver of a pure machine, settings, and the choice of a transport."""
