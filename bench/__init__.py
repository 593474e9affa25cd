"""How fast Sluice is and what it costs, measured from outside (`make bench`).

The agent is the real process, in a network namespace of its own.  What it reads comes over TCP from a stand-in API
server that sends bytes made beforehand (`server`); what it does is seen by a netlink socket that listens to the kernel
(`kernel`).  The agent's own clock counts nowhere.  `rounds` says what is measured, `report` prints it.
"""
