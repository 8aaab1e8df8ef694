"""Training under DeepSpeed: config, engine, schedules, norms across ranks, metrics."""
