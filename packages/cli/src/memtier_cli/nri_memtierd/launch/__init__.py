"""Ways to run an engine: in this process, or one process per container."""
