"""nri_core."""
