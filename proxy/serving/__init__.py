"""What the agent serves over HTTP.

    health.py       the health of every family's syncs, pure, and its answers       /healthz /livez      HC-1 to HC-9
    servers.py      `serve`: the health server and the metrics server, one coroutine for the agent's task group
    metrics.py      kube-proxy's metrics by its names, and ours                     /metrics             MET-*
    healthcheck.py  one small server per Service with a healthCheckNodePort                              HC-20 to HC-25
    observer.py     what the sync loops tell, to health and metrics
    pages.py        what is said of the program itself                              /statusz /flagz      HTTP-1
    profiles.py     where its CPU time and its memory go                            /debug/pprof/        HTTP-1
    http.py         the server under all of them: however many clients, a fixed share of the event loop
    messages.py     HTTP requests and responses, as values

The agent makes a `Server`, a `ProxyHealth`, a `Metrics` and an `Observer`, runs `serve` in its task group, and calls
`HealthCheckServers.sync` of each family after every sync of that family.
"""
