"""Heats as they are into heats as they will be, for policy heat."""
