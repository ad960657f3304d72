"""What all tests share: each process, also those that tests start, computes in one thread."""

import os

# Before torch and numpy are imported. pytest-xdist has a process on every core; threads of several processes wait for each
# other, which makes the tests of small networks ten times slower on a machine that does anything else.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
