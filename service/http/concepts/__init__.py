"""`/v1/concepts` as HTTP."""
