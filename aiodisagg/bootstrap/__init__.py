"""Who is there: a registry of peers with leases (pure), its HTTP server, and the client that peers keep open."""
