"""Benchmark scores of iterates."""
