"""Which stage runs next, and why: registry, keys, plan, runner, one stage's run."""
