"""Per-sample gradients: of which layers and loss, captured while a model runs, written to a store and read from it."""
