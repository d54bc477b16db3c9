"""Puts pages where a policy wants them, no faster than allowed."""
