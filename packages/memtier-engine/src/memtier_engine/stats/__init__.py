"""What happened: counted, bounded in memory, and shown as the reference's tables."""
