"""Data: from files in any accepted format to batches of token ids."""
