"""The concepts of the artifact, looked up in an index on disk."""
