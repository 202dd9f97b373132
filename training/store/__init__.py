"""Pooled representations on disk, in shards: written by collection, streamed by every later stage."""
