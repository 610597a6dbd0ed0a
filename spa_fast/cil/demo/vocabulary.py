"""What can be said of a creature: its attributes, their values, the phrases for each, and their tokens."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

# The phrases that describe each value of each attribute; a description of a class is the first phrase.
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "crimson": ("a crimson body", "deep red skin"),
        "amber": ("an amber body", "warm yellow skin"),
        "green": ("a green body", "leaf green skin"),
        "azure": ("an azure body", "bright blue skin"),
        "violet": ("a violet body", "dark purple skin"),
        "rose": ("a rose body", "pale pink skin"),
    },
    "pattern": {
        "plain": ("a plain coat", "no markings on the coat"),
        "stripes": ("dark stripes across the back", "a striped coat"),
        "spots": ("round pale spots on the flank", "a spotted coat"),
        "belly": ("a cream belly", "a coat that is pale below"),
    },
    "ears": {
        "pointed": ("long pointed ears", "tall ears that end in a tip"),
        "round": ("big round ears", "ears like discs"),
        "floppy": ("floppy ears", "ears that hang down"),
        "frilled": ("a frilled collar for ears", "ears like a jagged frill"),
    },
    "horns": {
        "spike": ("one straight horn", "a single spike on the forehead"),
        "curled": ("curled ram horns", "horns rolled into a coil"),
        "antlers": ("branching antlers", "antlers like twigs"),
        "feelers": ("feelers with round tips", "thin feelers that end in balls"),
    },
    "tail": {
        "bushy": ("a bushy tail", "a thick fluffy tail"),
        "spiral": ("a tail wound in a spiral", "a thin curly tail"),
        "arrow": ("a tail with an arrow tip", "a barbed tail"),
        "fan": ("a tail spread like a fan", "a wide feathered tail"),
    },
    "legs": {
        "short": ("short stubby legs", "thick little legs"),
        "long": ("long thin legs", "legs like stilts"),
        "tentacles": ("wavy tentacles for legs", "soft winding tentacles"),
        "flippers": ("broad flippers for feet", "wide webbed feet"),
    },
}
PARTS = ("ears", "horns", "tail", "legs")
Attributes = Mapping[str, str]
TEMPLATES = ("{}", "a photo of a creature with {}.", "a photo of {}.", "a creature with {}.")


def random_attributes(rng: np.random.Generator) -> dict[str, str]:
    """One value for each attribute, uniform over all combinations."""
    return {key: str(rng.choice(list(values))) for key, values in ATTRIBUTES.items()}


def write_vocabulary(path: Path) -> None:
    """Write a byte-pair vocabulary learnt from the phrases, as `SimpleTokenizer(bpe_path=...)` reads it.

    One header line, then one merge a line, and no newline at the end: an empty line would become a merge.
    Every word of the phrases becomes one token; other words fall back to pieces and single bytes.
    """
    phrases = [phrase for values in ATTRIBUTES.values() for texts in values.values() for phrase in texts]
    words = {word.strip(".,") for text in [*TEMPLATES, "and", *phrases] for word in text.split()} - {"{}"}
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)]
    merges = []
    while pairs := Counter(pair for s in spellings for pair in pairwise(s)):
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(f"{first} {second}")
        for s in spellings:
            for i in range(len(s) - 2, -1, -1):
                if s[i : i + 2] == [first, second]:
                    s[i : i + 2] = [first + second]
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write("\n".join(["#version: 0.2", *merges]).encode())
