"""Run folds: in this process, in spawned ones, on Ray."""
