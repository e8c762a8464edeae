"""Search: spaces, samplers, trials, storage, records, files."""
