"""Steps of build.py: Debian packages, our own, the archive, and the list of what is inside. Standard library only."""
