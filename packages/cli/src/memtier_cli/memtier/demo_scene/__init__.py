"""The demo: a workload with known hot and cold memory, and a judgement from outside the engine."""
