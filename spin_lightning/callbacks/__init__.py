"""Callbacks: the self-play loop and what is shown of it."""
