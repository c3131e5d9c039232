"""From which beta on exact best responses converge near the data, by variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# The defaults of the classes that the recursion is known for.
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "SPIN": {"history": 1},
    "MixtureSPIN": {"history": 2},
    "FictitiousSPIN": {"history": None},
    "AlphaSPIN": {"history": 1},
}


def best_response_threshold(model: str, settings: Mapping[str, Any]) -> float | None:
    """The beta above which exact best responses to the logistic loss converge locally.

    With u = log p - log p_data of first order and c = 1 - 1/beta, the linear recursions of
    docs/variants.md: u' = c mean(last h) converges for beta > 1/(h + 1); with alpha and responses
    from p_t for 1/beta + alpha < 2, with the token-level mixture for (1 - alpha) |c| < 1; with the
    last iterate alone as the reference a window of two gains nothing.

    Args:
        model: Name of the variant's class.
        settings: Its settings where they are not the defaults.

    Returns:
        None where it converges for each beta, or where the recursion is not known.
    """
    if model not in _DEFAULTS:
        return None
    chosen = {"loss": "logistic", "reference": "opponent", **_DEFAULTS[model], **settings}
    history, alpha = chosen["history"], chosen.get("alpha", 0.0)
    is_known = chosen["loss"] == "logistic" and isinstance(alpha, int | float)
    if not is_known or not isinstance(history, int):
        return None
    if chosen["reference"] == "previous":
        return 0.5 if history <= 2 and not alpha else None
    if not alpha:
        return 1 / (history + 1)
    if history != 1:
        return None
    token = chosen.get("mixture") == "token"
    return (1 - alpha) / (2 - alpha) if token else 1 / (2 - alpha)
