"""Fits an objective to a store of representations: batches, steps, checkpoints, workers, what is logged."""
