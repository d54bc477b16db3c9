"""Where memory should be: samples and a time in, tasks out. No IO."""
