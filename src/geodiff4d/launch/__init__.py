"""Many commands as jobs: on this machine's cores and GPUs, or on a Ray cluster."""
