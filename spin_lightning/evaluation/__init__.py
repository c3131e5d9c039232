"""Reading finished runs: pictures and tables."""
