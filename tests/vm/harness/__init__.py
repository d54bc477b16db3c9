"""The test VM: builds its kernel and root filesystem from Debian packages, boots it, runs commands in it."""
