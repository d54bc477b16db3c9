"""The reference daemon's configuration files, decoded and checked as a whole before anything starts: see `files`."""
