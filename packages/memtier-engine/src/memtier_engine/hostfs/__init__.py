"""What the kernel's files say. The root directory is an argument (`Host`), so that tests dress a folder."""
