"""A/B experiments on steering: who gets what, and what came of it."""
