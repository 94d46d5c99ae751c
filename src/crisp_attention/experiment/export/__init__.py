"""A study for other tools: one tidy table with a row a run, one with a row a prediction. From the records alone."""
