"""Lookups for people: one query at a time, in a browser or a terminal."""
