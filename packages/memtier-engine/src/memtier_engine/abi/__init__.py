"""What the kernel's headers say: numbers, flags, structures, and one typed ctypes wrapper per call."""
