"""Benchmarks: `make bench`. Each line is a ratio against something else in the same run."""
