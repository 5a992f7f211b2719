"""Several test processes at once leave each process one thread: more would only stand in each other's way."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
