"""Reports of runs: page, figures, tables, samples and studies."""
