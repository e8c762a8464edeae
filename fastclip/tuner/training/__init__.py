"""Train a model on one fold: data, splits, the loop, the explosion watch, the measures."""
