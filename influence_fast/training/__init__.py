"""What training itself tells of each sample, recorded as it passes by."""
