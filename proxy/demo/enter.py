"""Run a command inside a network namespace: `python enter.py PARENT /run/netns/NAME COMMAND ARGUMENT...`.

It becomes the command, so that the process started is the command's own.  The command is asked to end (SIGTERM) when
the thread that started it does, which is one of the process PARENT.
"""

import ctypes
import os
import signal
import sys

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


def main() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    parent, path, *command = sys.argv[1:]
    descriptor = os.open(path, os.O_RDONLY)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        sys.exit(f"setns {path}: {os.strerror(number)}")
    os.close(descriptor)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Of a parent that ended before that call the kernel tells nothing.
    if os.getppid() != int(parent):
        sys.exit("whoever started this has ended")
    # Signals that the parent holds back during its own clean-up are the command's business again.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execvp(command[0], command)  # noqa: S606  # running the command is what this is for


if __name__ == "__main__":
    main()
