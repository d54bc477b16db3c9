"""The laboratory: traces of what was touched, and policies tried on them without a kernel."""
