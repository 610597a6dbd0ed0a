"""What makes a single description useless for a text encoder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_REFUSAL = re.compile(
    r"\bsorry\b|\bas an? (ai|language model|large language)|\b(can ?not|can't|won't|unable to) "
    r"(help|assist|provide|identify|determine|describe|comply|fulfil|answer|generate|view|see the image)"
    r"|\bi (can ?not|can't|won't|am unable|am not able)|^(n/?a|none|null|unknown|not available)\W*$",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"^\s*([-*•>#]+\s|\d{1,2}[.)]\s|\(\d{1,2}\))|\*\*|__|`|\]\(|^\s*[\[{]"
    r"|</?[a-z][^>]*>|&(amp|lt|gt|quot|nbsp|#\d+);",
    re.IGNORECASE,
)
# Little words of other languages that are no English words.
_FOREIGN = re.compile(
    r"\b(und|mit|der|ist|les|einer|avec|dans|pour|une|los|una|para|della|een|het|och|med)\b", re.IGNORECASE
)


def text_fault(text: str) -> tuple[str, str] | None:
    """(kind, remedy) of what makes a text useless for a text encoder, or None."""
    plain_text = text.replace("’", "'")
    if not text.strip():
        return "empty", "write a text"
    if _REFUSAL.search(plain_text):
        return "refusal", "write a text about what is seen"
    if any(unicodedata.category(c) in ("Cc", "Cs") or c == "\ufffd" for c in text):
        return "control character", "keep plain text"
    if _MARKUP.search(plain_text):
        return "markup left over", "remove markdown, HTML, quotes and numbering"
    return None


def wrong_language(texts: Sequence[str]) -> bool:
    """Whether texts are not English: letters of another script, or other languages' little words."""
    letters = [c for text in texts for c in text if c.isalpha()]
    if sum(c.isascii() for c in letters) < 0.8 * len(letters):
        return True
    return sum(bool(_FOREIGN.search(text)) for text in texts) >= 2
