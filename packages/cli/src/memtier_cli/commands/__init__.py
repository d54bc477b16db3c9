"""One file per subcommand of `memtier`."""
