"""The only place that trains: a checkpoint, a run, its journal and its final evaluation."""
