"""Settings of all tests."""

from __future__ import annotations

import os

# Before torch is imported: tests run side by side, and threads of each would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
