"""Synthetic rows: planning, making, storing and checking them."""
