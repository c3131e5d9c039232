"""The run folder: paths, records, files, lock and fingerprint."""
