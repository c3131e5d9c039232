"""What people look at: page, figures, tables, samples and studies of runs."""
