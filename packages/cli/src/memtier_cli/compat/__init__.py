"""Programs that take the flags, files and formats of the ones they replace."""
