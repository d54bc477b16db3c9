"""Accessed bits by eBPF."""
