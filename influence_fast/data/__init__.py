"""Files to rows, rows to model inputs, batches, and label noise that is planted to be found."""
