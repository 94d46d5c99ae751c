"""A study for other tools, from the records alone: tables of runs and of predictions, MLflow, a copy to publish."""
