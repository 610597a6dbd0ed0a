"""What a model's answer holds, or why it cannot be stored. Needs the extra `describe` (pydantic)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from spa_fast.cil.descriptions.schema import Status
from spa_fast.cil.descriptions.wording import text_fault, wrong_language

# Tokens that an answer may take, thinking included; words that one description may have.
MAX_ANSWER = 4000
MAX_WORDS = 40


class Answer(BaseModel):
    """What the model has to answer."""

    model_config = ConfigDict(extra="forbid")
    descriptions: list[str]


class Unusable(Exception):
    """An answer that cannot be stored; `status` says why, the message tells the model and the user."""

    def __init__(self, status: Status, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.final = final


def read_answer(completion: object, count: int) -> list[str]:
    """The descriptions in an answer.

    Raises:
        Unusable: there are none, or not such as were asked for.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise Unusable("empty", "no answer in the response")
    message, ended = getattr(choices[0], "message", None), getattr(choices[0], "finish_reason", None)
    content = getattr(message, "content", None)
    content = content.strip() if isinstance(content, str) else ""
    if ended == "content_filter":
        raise Unusable("refused", "content filter")
    fault = text_fault(content) if not content.startswith(("{", "`")) else None
    if getattr(message, "refusal", None) or (fault and fault[0] == "refusal"):
        raise Unusable("refused", "the model refused")
    if ended == "length":
        raise Unusable("failed", f"longer than {MAX_ANSWER} tokens")
    if not content:
        raise Unusable("empty", "no text")
    try:
        # Servers without structured output fence their JSON.
        texts = Answer.model_validate_json(content.removeprefix("```json").strip("`\n ")).descriptions
    except ValidationError as error:
        raise Unusable("failed", "not the JSON that was asked for") from error
    texts = [" ".join(text.split()) for text in texts]
    for text in texts:
        if fault := text_fault(text):
            known: dict[str, Status] = {"refusal": "refused", "empty": "empty"}
            raise Unusable(known.get(fault[0], "failed"), f"a description with {fault[0]}: {fault[1]}")
        if len(text.split()) > MAX_WORDS:
            raise Unusable("failed", f"a description of more than {MAX_WORDS} words")
    if len(texts) != count:
        raise Unusable("failed" if texts else "empty", f"expected {count} descriptions, got {len(texts)}")
    if len({text.lower() for text in texts}) < len(texts):
        raise Unusable("failed", "the same description twice")
    if wrong_language(texts):
        raise Unusable("failed", "not English")
    return texts
