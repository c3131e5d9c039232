"""Synthetic rows: which there are to be, how they are made, stored and doubted."""
