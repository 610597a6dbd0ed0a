"""What is said to a model that describes a class, and how much of it there is."""

from __future__ import annotations

import hashlib

SYSTEM = "You describe in precise words what can be seen on single parts of an image."
PROMPT = (
    "{shown}List exactly {count} short visual attributes of the class '{name}'. Each names one thing that "
    "can be seen on a part of such an image: a part and its shape, a colour, a texture, a marking. Prefer "
    "what tells the class from similar ones. At most 12 words each, in English, plain text, no numbering, "
    "without the name of the class, nothing about background, light or photography. "
    'Answer with JSON: {{"descriptions": ["...", ...]}}'
)
SHOWN = "These images show '{name}'. "
COMPLAINT = "\nYour last answer could not be used: {complaint}."


def prompt_text(name: str, count: int, images: int, complaint: str = "") -> str:
    """The request for one class; `complaint` says what was wrong with the last answer."""
    shown = SHOWN.format(name=name) if images else ""
    text = PROMPT.format(shown=shown, count=count, name=name)
    return text + COMPLAINT.format(complaint=complaint) if complaint else text


def prompt_sha256() -> str:
    """Checksum of everything that is said to the model but names, counts, images and complaints."""
    return hashlib.sha256("\n".join((SYSTEM, PROMPT, SHOWN)).encode()).hexdigest()


def estimate(images: int, count: int) -> tuple[int, int]:
    """Tokens sent and answered for one class: 25 a description and 500 of thinking."""
    return estimate_sent(len(PROMPT) + len(SHOWN), images), 25 * count + 500


def estimate_sent(characters: int, images: int) -> int:
    """Tokens of a request: a quarter of its characters, and 85 for each image at low detail."""
    return (len(SYSTEM) + characters) // 4 + 85 * images
