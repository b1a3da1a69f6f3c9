"""The training samples with the most influence on a query: exact, or by FAISS over partitions by norm."""
