"""Pods, containers, adjustments and updates as plugin authors see them. No IO."""
