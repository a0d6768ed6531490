"""From documents to steps: the order of documents, packs of equal cost, batches ahead of their steps."""
