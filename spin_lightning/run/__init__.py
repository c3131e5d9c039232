"""What a run leaves on disk: its folder, its files, its lock and its fingerprint."""
