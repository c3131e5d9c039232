"""Data: files in any accepted format in, batches of token ids out."""
