"""One rank: its Ray replica, its vLLM engine, and how it follows the policy."""

import os

FORK_SERVER = "SERE_FORK_SERVER"
"""Environment variable: 1 = engines are forked by a process that has imported vLLM."""

if os.environ.get(FORK_SERVER) == "1":
    # Before anything of Ray or vLLM is imported here: the fork server imports meanwhile.
    from sere_ray.engine.forked import prepare

    prepare(lives_with=os.getppid())  # in a replica: Ray's process on this node
