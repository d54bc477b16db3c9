"""Whole cgroups, where nobody looks at single pages: the kernel chooses what goes (memory.reclaim)."""
