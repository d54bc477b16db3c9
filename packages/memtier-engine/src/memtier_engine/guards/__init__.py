"""When not to move: guards that decide from readings and a time, and the one module that reads."""
