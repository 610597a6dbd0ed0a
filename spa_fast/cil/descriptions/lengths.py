"""Descriptions longer than the text encoder takes: counted, and split where asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.layout import short


def over_length(
    pairs: Sequence[tuple[str, str]], tokens: Callable[[str], int], limit: int, template: str
) -> list[str]:
    """A line for each (class name, description) of more than `limit` tokens when joined."""
    over = []
    for name, text in pairs:
        if (count := tokens(_joined(template, name, text))) > limit:
            over.append(f"{name}: {count}: {text[:50]!r}")
    return over


def overflow(over: int, total: int, limit: int) -> str:
    """How many texts are too long, in words."""
    return f"{over / total:.1%} of texts over {limit} tokens"


def fit_lengths(
    names: Sequence[str],
    texts: Sequence[Sequence[str]],
    config: SpaConfig,
    tokenizer: object,
    limit: int,
    say: Callable[[str], None],
) -> list[list[str]]:
    """The first `n_descriptions` of each class, with one line about those that are too long.

    Split, each piece is a description of its own, and none of the others is dropped for it.

    Args:
        names: class names.
        texts: descriptions per class.
        config: how many are used, how they are joined with the name, and what becomes of long ones.
        tokenizer: the text encoder's; it counts by `encode`, as open_clip's does, else nobody can.
        limit: most tokens that the encoder takes, start and end included.
        say: takes the line.
    """
    encode = getattr(tokenizer, "encode", None)
    used = [list(lines[: config.n_descriptions]) for lines in texts]
    if encode is None:
        return used

    def tokens(text: str) -> int:
        return len(encode(text)) + 2

    template = config.description_template
    pairs = [(name, text) for name, lines in zip(names, used, strict=True) for text in lines]
    over = over_length(pairs, tokens, limit, template)
    if not over:
        return used
    split = config.long_descriptions == "split"
    what = "split" if split else "the rest is cut; --long-descriptions split keeps it"
    say(f"warning: descriptions: {overflow(len(over), len(pairs), limit)}, {what}: {short(over, 2)}")
    if not split:
        return used
    pieces = []
    for name, lines in zip(names, used, strict=True):
        fits = functools.partial(_fits, tokens, limit, template, name)
        pieces.append([piece for text in lines for piece in split_text(text, fits)])
    return pieces


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Pieces of a text that fit, of whole words, ending at punctuation where that is not far to find."""
    words, pieces = text.split(), []
    while words:
        n = next((i for i in range(1, len(words)) if not fits(" ".join(words[: i + 1]))), len(words))
        if n < len(words):
            n = next((i for i in range(n, n // 2, -1) if words[i - 1][-1] in ".;,:"), n)
        pieces.append(" ".join(words[:n]))
        words = words[n:]
    return pieces


def _fits(tokens: Callable[[str], int], limit: int, template: str, name: str, text: str) -> bool:
    return tokens(_joined(template, name, text)) <= limit


def _joined(template: str, name: str, text: str) -> str:
    return template.replace("{name}", name).replace("{description}", text.lower())
