"""Benchmarks from files on this machine, as tasks of lm-evaluation-harness."""
