"""Run folds: in this process, in others, on Ray."""
