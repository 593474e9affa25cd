"""Wait until the agent's kernel holds what was published: `settled.py PORT SECONDS`, on a node, as root.

What is published carries a Service that marks it, sluice-lab/marker, whose port is PORT (0: nothing marks it).  Once
the agent knows it and no sync is due, all that was published with it has been applied.  Prints what the agent says of
itself.
"""

import json
import socket
import sys
import time
from typing import Any


def ask(verb: str, **arguments: str) -> list[Any]:
    """What the agent answers: all parts, and then the result."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect("/run/sluice/agent.sock")
        sock.sendall(json.dumps({"version": 1, "verb": verb, "arguments": arguments}).encode() + b"\n")
        lines = [json.loads(line) for line in sock.makefile()]
    if error := lines[-1].get("error"):
        raise OSError(error)
    return [each for line in lines for each in line.values()]


def marked(port: int) -> bool:
    text = json.dumps(ask("objects", service="sluice-lab/marker"))
    return f'"port": {port},' in text or f'"port": {port}}}' in text


def settled(status: dict[str, Any]) -> bool:
    families = status["families"]
    return (
        status["synced"]
        and not status["pendingChanges"]
        and bool(families)
        and not any(each["syncs"]["pending"] or not each["syncs"]["count"] for each in families)
    )


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    deadline = time.monotonic() + seconds
    said: object = "nothing"
    while time.monotonic() < deadline:
        try:
            if not port or marked(port):
                status = ask("status")[-1]
                said = [each["syncs"] for each in status["families"]]
                if settled(status):
                    print(json.dumps(status))
                    return
            else:
                said = "it does not have the marker"
        except OSError as error:
            said = str(error)
        time.sleep(0.2)
    sys.exit(f"the agent has not applied what was published within {seconds:.0f} s; it says: {said}")


if __name__ == "__main__":
    main()
