"""Names of the ways to make one score of many (``aggregation``), for who only lists or checks them."""

BASES = ("mean", "rank", "vote", "min", "median", "trimmed")
METHODS = (*BASES, *(f"{base}-c" for base in BASES))
