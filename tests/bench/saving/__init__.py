"""What each way to take memory saves on real programs, and what that costs them: `make bench-saving`."""
