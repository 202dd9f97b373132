"""Stage 1 in parts: what turns pairs into states, how a portion becomes a shard, who makes which portion."""
