"""Policies: a model whose past iterates can be called back."""
