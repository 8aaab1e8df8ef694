"""Training under DeepSpeed: config, engine, schedules, norms over ranks, metrics."""
