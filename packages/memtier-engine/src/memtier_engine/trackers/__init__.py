"""What was touched: each tracker asks the kernel in its own way."""
