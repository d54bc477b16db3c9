"""Program `memtier`: one file per subcommand."""
