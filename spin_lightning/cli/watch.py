"""Watch."""


def watch(args: list[str]) -> None:
    """Watch."""
