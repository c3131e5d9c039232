"""Why a mutant may survive: it computes the same, or what differs is no behaviour."""

# Module, the line as it is, the line as it was changed: why no test can or should tell them apart.
REASONS: dict[tuple[str, str, str], str] = {}
