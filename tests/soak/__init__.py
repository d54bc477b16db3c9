"""Hours of churn under the program nri-memtierd, and whether it stays as it was: `make soak`."""
