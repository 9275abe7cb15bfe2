"""An HTTP endpoint as a source of scores: one JSON call for each batch of responses.

    POST URL
    {"prompts": [[{"role": "user", "content": "..."}], ...], "responses": ["...", ...],
     "query": ["...", ...], "COLUMN": [...], ...}

    200
    {"scores": [0.5, ...]}

The fields of the call are the arguments of a reward function, see `reward_functions`, so a server
can pass them to one. `query` is each conversation as the policy's template writes it, and the
scores may be named "rewards": servers of OpenRLHF's form read the one and write the other. All
other fields are the columns of the prompts' rows.

A connection that fails, an answer that comes too late, and the status 429 or 5xx may pass: the call
is repeated, after ever longer waits. With several processes the first one calls, for all of them.
"""

import functools
import http.client
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms.reward_functions import free_keywords, number_of, where
from alignjax.config import Reward, UserError, first_line
from alignjax.data import templates
from alignjax.machine import collectives, console, user_code

FIELDS = ("prompts", "responses", "query")  # of a call, which no column takes
SCORES = ("scores", "rewards")  # field of an answer that holds them
FIRST_WAIT = 1.0  # seconds before a call is repeated; each further wait is twice as long
LONGEST_WAIT = 30.0
LONGEST_ANSWER = 1 << 26  # bytes
CHUNK = 1 << 16
TOO_MANY_REQUESTS = 429


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Turns a redirection into an error: following it would repeat a POST as a GET."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request to follow."""
        return None


OPENER = urllib.request.build_opener(NoRedirects)


class CallFailedError(Exception):
    """A call without an answer.

    `may_pass` says whether it is worth repeating, `wait` how many seconds the server asks for.
    """

    def __init__(self, reason: str, *, may_pass: bool, wait: float = 0.0):
        super().__init__(reason)
        self.may_pass = may_pass
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class EndpointReward:
    """An HTTP endpoint as a text-based reward."""

    field: str  # of the config, that names it
    source: Reward  # its entry in `ppo.rewards`
    keywords: Mapping[str, str]  # column of the rows -> its field in a call
    tokenizer: PreTrainedTokenizerBase | None = None  # of the policy, for `query`

    @property
    def name(self) -> str:
        """Return how errors begin."""
        return f"{self.field}={self.source.source}"

    def __call__(self, rows: list[dict], responses: list[str]) -> np.ndarray:
        """Return the scores of the endpoint, as float32, in every process.

        Raises:
          UserError: if it gives no answer in all its attempts, or an answer of another form.
        """
        outcome = b""
        if jax.process_index() == 0:
            outcome = self.outcome(rows, responses)
        first_outcome = json.loads(collectives.gather(outcome)[0])
        if "error" in first_outcome:
            raise UserError(first_outcome["error"])
        with np.errstate(over="ignore"):
            return np.asarray(first_outcome["scores"], np.float64).astype(np.float32)

    def outcome(self, rows: list[dict], responses: list[str]) -> bytes:
        """Return {"scores": [...]}, or {"error": its line}, as JSON for all processes."""
        scores: list[float] = []
        batch = self.source.batch
        try:
            for start in range(0, len(rows), batch):
                part = slice(start, start + batch)
                scores += self.score_batch(rows[part], responses[part])
        except UserError as error:
            return json.dumps({"error": str(error)}).encode()
        return json.dumps({"scores": scores}).encode()

    def score_batch(self, rows: list[dict], responses: list[str]) -> list[float]:
        """Return the scores of the responses of one call."""
        call = {
            "prompts": [row["prompt"] for row in rows],
            "responses": responses,
            "query": [
                self.query(row["prompt"], response)
                for row, response in zip(rows, responses, strict=True)
            ],
        }
        for column, keyword in self.keywords.items():
            call[keyword] = [row.get("columns", {}).get(column) for row in rows]
        answer = self.post(json.dumps(call).encode())
        return self.check(answer, rows, responses)

    def query(self, messages: list[dict], response: str) -> str:
        """Return a conversation as text; without a tokenizer, its contents by lines."""
        if self.tokenizer is None:
            return "\n".join([*(message["content"] for message in messages), response])
        return templates.render(self.tokenizer, messages, generate=True) + response

    def post(self, body: bytes) -> bytes:
        """Return the answer to a call, which is repeated while its failure may pass."""
        attempts = self.source.retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return send(self.source.source, body, self.source.timeout)
            except CallFailedError as error:
                failure = f"{self.name}: {error}, in attempt {attempt} of {attempts}"
                if attempt == attempts or not error.may_pass:
                    raise UserError(
                        f"{failure}; once it answers, the same command continues"
                    ) from None
                wait = min(max(FIRST_WAIT * 2 ** (attempt - 1), error.wait), LONGEST_WAIT)
            with console.bar_set_aside():
                console.say(f"{failure}; again in {wait:.3g} s")
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def check(self, answer: bytes, rows: list[dict], responses: list[str]) -> list[float]:
        """Return the scores of an answer; raise UserError if they are not one for each response."""
        scores_for = f"for {len(rows)} responses, the first to the prompt of {where(rows[0])}"
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            shown = user_code.describe_value(answer.decode(errors="replace"))
            raise UserError(f"{self.name}: its answer is not JSON: {shown}") from None
        items = None
        if isinstance(value, dict):
            items = next((value[key] for key in SCORES if key in value), None)
        if not isinstance(items, list):
            raise UserError(
                f'{self.name}: expected {{"scores": [...]}} {scores_for}, found '
                f"{user_code.describe_value(value)}"
            )
        if len(items) != len(rows):
            raise UserError(f"{self.name}: {len(items)} scores {scores_for}")
        numbers = [number_of(item) for item in items]
        for item, number, row, response in zip(items, numbers, rows, responses, strict=True):
            if number is None:
                raise UserError(
                    f"{self.name}: score {user_code.describe_value(item)} for the response "
                    f"{response[:80]!r} to the prompt of {where(row)} is not a number"
                )
        return numbers


def load(
    field: str, source: Reward, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> EndpointReward:
    """Return the endpoint that an entry of `ppo.rewards` names, for rows with these columns."""
    return EndpointReward(
        field=field,
        source=source,
        keywords=free_keywords(FIELDS, columns),
        tokenizer=tokenizer,
    )


def send(url: str, body: bytes, timeout: float) -> bytes:
    """Send one call and return the body of its answer.

    Raises:
      CallFailedError: if there is no answer within `timeout` seconds, or its status is not 2xx.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    deadline = time.monotonic() + timeout
    late = functools.partial(CallFailedError, f"no answer within {timeout:g} s", may_pass=True)
    try:
        with OPENER.open(request, timeout=timeout) as response:
            chunks = []
            length = 0
            while chunk := response.read1(CHUNK):
                chunks.append(chunk)
                length += len(chunk)
                if length > LONGEST_ANSWER:
                    raise CallFailedError(f"over {LONGEST_ANSWER} bytes", may_pass=False)
                if time.monotonic() > deadline:
                    raise late()
            return b"".join(chunks)
    except urllib.error.HTTPError as error:
        raise failure_of_status(error) from None
    except TimeoutError:
        raise late() from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise late() from None
        certificate_is_wrong = isinstance(error.reason, ssl.SSLCertVerificationError)
        reason = f"no connection: {error.reason}"
        raise CallFailedError(reason, may_pass=not certificate_is_wrong) from None
    except (OSError, http.client.HTTPException, socket.gaierror) as error:
        reason = f"the connection broke: {type(error).__name__} {error}".strip()
        raise CallFailedError(reason, may_pass=True) from None


def failure_of_status(error: urllib.error.HTTPError) -> CallFailedError:
    """Return the failure that an answer with another status than 2xx is."""
    with error:
        try:
            text = first_line(error.read(CHUNK).decode(errors="replace"), 200)
        except (OSError, http.client.HTTPException):
            text = ""
    reason = f"status {error.code} {error.reason}".strip()
    if text:
        reason += f" ({text!r})"
    may_pass = error.code == TOO_MANY_REQUESTS or error.code >= http.client.INTERNAL_SERVER_ERROR
    wait = error.headers.get("Retry-After", "")
    return CallFailedError(reason, may_pass=may_pass, wait=float(wait) if wait.isdecimal() else 0.0)
