"""How good a ranking is: against known noise, beside baselines, and by retraining without its lowest samples."""
