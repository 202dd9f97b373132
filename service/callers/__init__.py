"""Who asks: keys, quotas, feedback."""
