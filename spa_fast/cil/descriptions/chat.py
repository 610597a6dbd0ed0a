"""Asking a model for the descriptions of one class over the chat-completions API.

Needs the extra `describe` (openai, pydantic). The key is read by the SDK from OPENAI_API_KEY and stays there.
"""

from __future__ import annotations

import base64
import email.utils
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai

from spa_fast.cil.descriptions.answers import MAX_ANSWER, Answer, Unusable, read_answer
from spa_fast.cil.descriptions.budget import Budget
from spa_fast.cil.descriptions.prompt import SYSTEM, estimate_sent, prompt_text
from spa_fast.cil.descriptions.schema import Status
from spa_fast.cil.descriptions.threads import started
from spa_fast.cil.errors import RunError

TIMEOUT = 60.0
LONGEST_WAIT = 120.0


class Busy(Exception):
    """No answer this time; `wait` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Late(Busy):
    """No answer in time; it may have to be paid for."""


class Outcome(NamedTuple):
    """What became of one class: its texts and status, why there are none, and whether any answer came."""

    texts: list[str]
    status: Status
    reason: str
    answered: bool


class Writer:
    """One model at one address; threads may share it.

    Args:
        model: model name.
        base_url: address of the API; empty takes the SDK's.
        asks: whether it will be asked, which needs a key.
        budget: counts what requests use, and may cap it.
        timeout: seconds after which a request is given up.
        sleep: waits between attempts; by default until `stop`, at the longest.

    Attributes:
        address: where requests go.
        attempts: most requests for a class.

    Raises:
        RunError: no key in the environment, or an address that is none.
    """

    attempts = 4

    def __init__(
        self,
        model: str,
        base_url: str = "",
        *,
        asks: bool = True,
        budget: Budget | None = None,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        try:
            # A redirect would send images to an address that nobody agreed to.
            straight = openai.DefaultHttpxClient(follow_redirects=False, timeout=timeout)
            self._client = openai.OpenAI(
                api_key=None if asks else "none",
                base_url=base_url or None,
                timeout=timeout,
                max_retries=0,
                http_client=straight,
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
        self._model, self._timeout, self._budget = model, timeout, budget or Budget()
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def stop(self) -> None:
        """Let no class be asked for again; requests under way may still be answered."""
        self._stopped.set()

    def ask(self, name: str, count: int, images: Sequence[bytes]) -> Outcome:
        """Descriptions of one class.

        Args:
            name: class name.
            count: descriptions wanted.
            images: JPEG files.

        Raises:
            CostCap: the cap could be passed.
            RunError: nothing further can be asked: key, model, quota or request refused.
        """
        status: Status = "failed"
        reason = complaint = ""
        answered = False
        for attempt in range(self.attempts):
            try:
                return Outcome(self._once(name, count, images, complaint), "ok", "", True)
            except Unusable as error:
                answered = True
                status, reason, complaint = error.status, str(error), str(error)
                if error.final:
                    break
            except Busy as error:
                status, reason = "failed", str(error)
                if attempt + 1 < self.attempts:
                    self._sleep(2.0**attempt if error.wait is None else error.wait)
            if self._stopped.is_set():
                break
        return Outcome([], status, reason, answered)

    def _once(self, name: str, count: int, images: Sequence[bytes], complaint: str) -> list[str]:
        text = prompt_text(name, count, len(images), complaint)
        most = (estimate_sent(len(text), len(images)), MAX_ANSWER)
        with self._budget.request(*most) as take:
            try:
                # The SDK's timeout starts anew with every byte.
                completion = started(lambda: self._request(text, images)).result(self._timeout)
            except (Late, TimeoutError) as error:
                take(*most)
                raise Late("no answer in time") from error
            take(*_used(completion, most))
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
            raise Late("no answer in time") from error
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


def _used(completion: object, most: tuple[int, int]) -> tuple[int, int]:
    """Tokens that an answer says it took; what it does not say counts as the most."""
    usage = getattr(completion, "usage", None)
    sent, answered = (getattr(usage, key, None) for key in ("prompt_tokens", "completion_tokens"))
    return (
        sent if isinstance(sent, int) and sent >= 0 else most[0],
        answered if isinstance(answered, int) and answered >= 0 else most[1],
    )


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
