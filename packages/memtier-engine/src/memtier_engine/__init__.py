"""memtier_engine: finds which memory of processes is not used, and pages it out or moves it to another node."""
