"""Keys and tokens that a user put into settings or paths, taken out of what is written."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

# (Valid as a plain YAML scalar, unlike asterisks.)
MASK: Final = "<masked>"
# Secrets of common services: the hub, OpenAI and similar services, GitHub, W&B, AWS.
_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|wandb_v1_\w{16,}|AKIA[A-Z0-9]{16}"
    r"|Bearer\s+[\w.~+/-]{8,}=*)"
)
# `https://user:password@host`
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
# `api_key: value` of YAML, `api_key=value` of a message or an address.
_NAMED = re.compile(
    r"(?i)((?<!\w)(?:(?:[\w-]*[_-])?(?:api_?key|access_?key|password|passwd|secret)"
    r"|(?:(?:hub|hf|auth|access|api|refresh|session|bot|user|wandb|use_auth)_?)?token)"
    r"['\"]?[ \t]*[:=][ \t]*)(?!null\b|none\b|true\b|false\b)('[^'\n]*'|\"[^\"\n]*\"|[^\s'\",}&]+)"
)
_SHORTEST = 6


def masked(text: str, secrets: Collection[str | None] = ()) -> str:
    """A text with everything in it that looks like a secret replaced by a mask.

    Args:
        text: Any text: a message, a configuration as YAML.
        secrets: Values that are known to be secret, whatever they look like.

    Example:
        >>> masked("api_key: abc123, model: https://me:pw@host/m, max_tokens: 5")
        'api_key: <masked>, model: https://<masked>@host/m, max_tokens: 5'
    """
    for secret in secrets:
        if secret and len(secret) >= _SHORTEST:
            text = text.replace(secret, MASK)
    text = _IN_ADDRESS.sub(MASK, _SECRETS.sub(MASK, text))
    return _NAMED.sub(_hide, text)


def _hide(found: re.Match[str]) -> str:
    quote = found[2][0] if found[2][0] in "'\"" else ""
    return f"{found[1]}{quote}{MASK}{quote}"
