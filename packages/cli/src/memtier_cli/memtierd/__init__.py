"""Program `memtierd`: the flags, files and formats of the reference's daemon, and its prompt."""
