"""Asking a model for the descriptions of one class over the chat-completions API.

Needs the extra `describe` (openai, pydantic). The key is read by the SDK from OPENAI_API_KEY and stays there.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai

from spa_fast.cil.descriptions.answers import MAX_ANSWER, Answer, Unusable, read_answer
from spa_fast.cil.descriptions.schema import Status
from spa_fast.cil.errors import RunError

TIMEOUT = 60.0
ATTEMPTS = 4
LONGEST_WAIT = 120.0

SYSTEM = "You describe in precise words what can be seen on single parts of an image."
PROMPT = (
    "{shown}List exactly {count} short visual attributes of the class '{name}'. Each names one thing that "
    "can be seen on a part of such an image: a part and its shape, a colour, a texture, a marking. Prefer "
    "what tells the class from similar ones. At most 12 words each, in English, plain text, no numbering, "
    "without the name of the class, nothing about background, light or photography. "
    'Answer with JSON: {{"descriptions": ["...", ...]}}'
)
SHOWN = "These images show '{name}'. "


def prompt_sha256() -> str:
    """Checksum of everything that is said to the model but names, counts and images."""
    return hashlib.sha256("\n".join((SYSTEM, PROMPT, SHOWN)).encode()).hexdigest()


class CostCap(RunError):
    """The next request could cost more than was allowed."""


class Busy(Exception):
    """No answer this time; `wait` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Writer:
    """One model at one address, what it has used so far, and the most it may cost.

    Args:
        model: model name.
        base_url: address of the API; empty takes the SDK's.
        prices: USD per million tokens sent and answered.
        max_cost: USD that may be spent; None means no cap.
        timeout: seconds without a byte after which a request is given up.
        sleep: waits between attempts.

    Attributes:
        address: where requests go.
        used: tokens sent and answered.
        answered: whether the last class got any answer at all, of use or not.

    Raises:
        RunError: no key in the environment, or an address that is none.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "",
        *,
        prices: tuple[float, float] = (0.0, 0.0),
        max_cost: float | None = None,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        try:
            # A redirect would send images to an address that nobody agreed to.
            straight = openai.DefaultHttpxClient(follow_redirects=False, timeout=timeout)
            self._client = openai.OpenAI(
                base_url=base_url or None, timeout=timeout, max_retries=0, http_client=straight
            )
        except openai.OpenAIError as error:
            raise RunError(_NO_KEY) from error
        self._key = str(self._client.api_key)
        if not self._key.strip():
            raise RunError(_NO_KEY)
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise RunError("OPENAI_API_KEY: expected printable characters without blanks")
        self.address = str(self._client.base_url)
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RunError("--base-url: expected http(s)://HOST/PATH without a user name or query")
        self._model, self._sleep = model, sleep
        self._prices, self._max_cost = prices, max_cost
        self.used = (0, 0)
        self.answered = False

    def cost(self, sent: int, answered: int) -> float:
        """USD for so many tokens."""
        return (sent * self._prices[0] + answered * self._prices[1]) / 1e6

    def ask(self, name: str, count: int, images: Sequence[bytes]) -> tuple[list[str], Status, str]:
        """Descriptions of one class, its status, and the reason if there are none.

        Args:
            name: class name.
            count: descriptions wanted.
            images: JPEG files.

        Raises:
            CostCap: the cap would be passed.
            RunError: nothing further can be asked: key, model, quota or request refused.
        """
        status: Status = "failed"
        reason = complaint = ""
        self.answered = False
        for attempt in range(ATTEMPTS):
            try:
                texts = self._once(name, count, images, complaint)
                self.answered = True
                return texts, "ok", ""
            except Unusable as error:
                self.answered = True
                status, reason, complaint = error.status, str(error), str(error)
                if error.final:
                    break
            except Busy as error:
                status, reason = "failed", str(error)
                if attempt + 1 < ATTEMPTS:
                    self._sleep(2.0**attempt if error.wait is None else error.wait)
        return [], status, reason

    def _once(self, name: str, count: int, images: Sequence[bytes], complaint: str) -> list[str]:
        text = PROMPT.format(shown=SHOWN.format(name=name) if images else "", count=count, name=name)
        if complaint:
            text += f"\nYour last answer could not be used: {complaint}."
        sent = estimate_sent(len(text), len(images))
        spent = self.cost(self.used[0] + sent, self.used[1] + MAX_ANSWER)
        if self._max_cost is not None and spent > self._max_cost:
            so_far = self.cost(*self.used)
            raise CostCap(
                f"--max-cost: ${so_far:.4f} spent, the next request could pass ${self._max_cost:g}; "
                "raise it and run the same command again"
            )
        completion = self._request(text, images)
        usage = getattr(completion, "usage", None)
        counted = [getattr(usage, key, None) for key in ("prompt_tokens", "completion_tokens")]
        new = [n if isinstance(n, int) else e for n, e in zip(counted, (sent, MAX_ANSWER), strict=True)]
        self.used = (self.used[0] + new[0], self.used[1] + new[1])
        return read_answer(completion, count)

    def _request(self, text: str, images: Sequence[bytes]) -> object:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for image in images:
            url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url, "detail": "low"}})
        schema = {"name": "descriptions", "schema": Answer.model_json_schema(), "strict": True}
        create: Callable[..., object] = self._client.chat.completions.create
        try:
            return create(
                model=self._model,
                messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}],
                response_format={"type": "json_schema", "json_schema": schema},
                max_completion_tokens=MAX_ANSWER,
            )
        except openai.APITimeoutError as error:
            raise Busy("no answer in time") from error
        except openai.APIConnectionError as error:
            raise Busy("connection lost") from error
        except openai.APIStatusError as error:
            raise self._judged(error) from error
        except (openai.APIResponseValidationError, ValueError) as error:
            raise Unusable("failed", "the answer is not JSON") from error

    def _judged(self, error: openai.APIStatusError) -> Exception:
        """What an HTTP status means for this class and for the run."""
        code = error.status_code
        words = " ".join(str(error).replace(self._key, "***").split())[:300]
        kind = f"{error.code or ''} {error.type or ''}"
        if code == 429 and "insufficient_quota" in kind:
            return RunError(f"describe: {self.address}: the account's quota is used up: {words}")
        if code in (408, 409, 429) or code >= 500:
            wait = _retry_after(error.response.headers)
            if wait is not None and wait > LONGEST_WAIT:
                return RunError(
                    f"describe: {self.address} asks to wait {wait:.0f} s: run the same command again then"
                )
            return Busy(f"HTTP {code}", wait)
        if code == 400 and ("content_filter" in kind or "content_policy" in kind):
            return Unusable("refused", "content filter", final=True)
        if code in (401, 403):
            return RunError(f"OPENAI_API_KEY: not accepted by {self.address}: {words}")
        if code == 404:
            return RunError(f"--model: {self._model!r} is not at {self.address}: {words}")
        return RunError(f"describe: {self.address} refuses the request: {words}")


def estimate(images: int, count: int) -> tuple[int, int]:
    """Tokens sent and answered for one class: 25 a description and 500 of thinking."""
    return estimate_sent(len(PROMPT) + len(SHOWN), images), 25 * count + 500


def estimate_sent(characters: int, images: int) -> int:
    """Tokens of a request: a quarter of its characters, and 85 for each image at low detail."""
    return (len(SYSTEM) + characters) // 4 + 85 * images


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None


_NO_KEY = "OPENAI_API_KEY: not set: export it, or use --from-template, which asks no model"
