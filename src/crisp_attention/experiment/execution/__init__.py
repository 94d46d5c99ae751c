"""Pending runs and trials of a search, on worker processes, under a launcher, or on a Ray cluster."""
