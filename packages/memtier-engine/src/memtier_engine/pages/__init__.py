"""What is known of pages: how old each is, what went out and came back, counters per region. No IO."""
