"""Several replicas, one truth: which of them has a thread, and what it does to have it, keep it and let go of it."""
