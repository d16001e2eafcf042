"""Several processes: ranks, children, a pool, turns and signals."""
