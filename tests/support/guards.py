"""Guards for tests on a machine that others use too."""

from __future__ import annotations

from memtier_engine.guards.config import GuardsConfig

OWN_GUARDS = GuardsConfig(memory_psi_node=None, io_psi_node=None)
"""All guards but those about the whole node: the load of others does not hold back what a test waits for."""
