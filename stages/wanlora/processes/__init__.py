"""Several processes: ranks and signals."""
