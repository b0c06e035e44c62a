"""``aiodisagg demo``: a whole system on this host, real requests through its HTTP API, answers against the monolith."""
