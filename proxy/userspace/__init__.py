"""The userspace dataplane: Services carried by worker processes, without netfilter.

In the agent:

    dataplane    one family: sync, apply, read, clean up
    ├─ fleet     all workers, for that family ─── supervisor   the processes: started, found, replaced, ended
    ├─ anyip     the routes by which addresses are the node's      known   what was written last
    ├─ sockdiag  the sockets that the kernel has ─── decode        workers' answers and kernel into a table
    ├─ watch     workers that die, routes that change              totals, metrics   what workers have counted
    └─ handover  from and to a mode of rules

Between them: control, the protocol of the workers' sockets.

In a worker (`python -m proxy.userspace.worker`):

    worker       one process: control, timers, draining
    ├─ table     frontends ─── admission, filters   who may come      choose   who gets which backend
    ├─ listeners the sockets at the frontends ─── sockets
    ├─ tcp       accepting, connecting ─── relay, splice              proxy_protocol
    ├─ udp       flows of datagrams ─── icmp
    ├─ poller    which sockets are ready, in either event loop
    └─ stats     counting                                              tracing   telling
"""
