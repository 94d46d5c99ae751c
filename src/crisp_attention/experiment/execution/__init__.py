"""Pending runs on worker processes."""
