"""The whole job, from a model and its data to a ranking, a report and a check of how far to trust it; and the demo."""
