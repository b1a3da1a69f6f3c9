"""Influence of training samples on queries by every registered method, and its aggregation to one score a sample."""
