"""The parts of `training.evaluate_hallucination`: conditions, asking, statistics, and the verdict in words."""
