"""
Tries mutants in forks of one process that has imported what no mutant changes, because that takes longer than the tests.

``serve ARGUMENTS`` runs pytest with these arguments in a fork whenever it is asked to; ``ask`` ends as that pytest did.
"""

import importlib
import os
import resource
import socket
import sys

ADDRESS = "warm.socket"
#: Seconds that the processor may work on one run; ten times what it takes where nothing is wrong
LIMIT = 60


def serve(arguments: list[str]) -> None:
    """Never comes back."""
    for name in ("gymnasium", "pytest", "sb3_contrib", "scipy.integrate", "stable_baselines3", "torch"):
        importlib.import_module(name)
    assert "sb3_ppo_penalty" not in sys.modules
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(ADDRESS)
        server.listen()
        while True:
            client, _ = server.accept()
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
                os._exit(sys.modules["pytest"].main(arguments))
            _, status = os.waitpid(child, 0)
            with client:
                client.sendall(b"passed" if status == 0 else b"failed")


def ask() -> int:
    """The status to end with."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(ADDRESS)
        answer = client.recv(6)
    return {b"passed": 0, b"failed": 1}.get(answer, 2)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    sys.exit(ask())
