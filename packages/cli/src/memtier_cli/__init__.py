"""The programs: memtier, memtierd, nri-memtierd."""
