"""Numbers from predictions: passes over a split, metrics, baselines, generation, search."""
