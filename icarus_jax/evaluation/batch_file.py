"""Reads OpenAI's batch files, and makes lines of OpenAI's batch output of the answers.

A line that cannot be sent costs no other line its answer. It gets an error under its custom_id. A line without a
custom_id of its own (broken JSON, say, or a custom_id that an earlier line has) can have no line in the output, so it
is reported by its number.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Container, Generator, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icarus_jax.evaluation.batch import CHAT, COMPLETIONS, RESPONSES, Evaluation, Job, digest, encode
from icarus_jax.evaluation.json_lines import parse_line
from icarus_jax.evaluation.result_file import Line
from icarus_jax.server.body import MAX_BODY_BRACKETS, MAX_BODY_BYTES, MAX_BODY_COMMAS

URLS = (COMPLETIONS, CHAT, RESPONSES)
_ID = "batch_req_"
BEGINS = f'{{"id":"{_ID}'.encode()  # how each line of the output begins


def batch_evaluation(path: Path, served: Mapping[str, Any], limit: int = 0) -> Evaluation:
    """Reads an OpenAI batch file, as `read_requests` does.

    Args:
        path: the batch file.
        served: what answers the requests (models and weights), as JSON.
        limit: how many of the first requests to run; 0: all.

    Returns:
        The evaluation of the requests.

    Raises:
        ValueError: no line has a custom_id.
    """
    evaluation = read_requests(path, served)
    if not evaluation.jobs:
        first = [f"{path}:{number}: {why}" for number, why in evaluation.unusable.items()][:1]
        raise ValueError("; ".join([f"{path} holds no requests", *first]))
    return dataclasses.replace(evaluation, jobs=evaluation.jobs[: limit or None])


def read_requests(path: Path, served: Mapping[str, Any]) -> Evaluation:
    """Reads an OpenAI batch file: lines of {"custom_id", "method", "url", "body"}.

    The result file has OpenAI's batch output format. A line's `response` is the API's answer, with its status. If there
    is none, because the request cannot be sent or the server has failed on it twice, `response` is null and `error` is
    {"code", "message"}. The id of each line is made from the request and from `served`, so that the lines of another
    run can be recognised.

    Args:
        path: the batch file.
        served: what tells this run from others, as JSON: models and weights, say.

    Returns:
        The evaluation of the requests. Its report names the lines without a custom_id of their own, and its `unusable`
        says what is wrong with each.
    """
    models: dict[Hashable, str] = {}
    jobs: list[Job] = []
    unusable: dict[int, str] = {}
    for entry in each_request(path, served):
        if isinstance(entry, Unusable):
            unusable[entry.number] = entry.reason
        else:
            jobs.append(entry.job)
            models[entry.job.key] = entry.model

    def key(line: Line) -> Hashable:
        if (found := line.get("id")) not in models:
            raise ValueError(f"it holds the results of another run (custom_id {line.get('custom_id')!r})")
        return found

    def report(lines: list[Line]) -> dict[str, Any]:
        requests = Counter(models[line["id"]] for line in lines)
        failed = Counter(models[line["id"]] for line in lines if not is_answered(line))
        figures = {model: {"requests": count, "failed": failed[model]} for model, count in requests.items()}
        totals = {"rows": len(lines), "failed": failed.total(), "unusable_lines": list(unusable)}
        return {"task": "batch", **totals, "models": figures}

    return Evaluation(jobs, None, key, report, BEGINS, unusable)


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of a batch file that a job can be made of.

    Attributes:
        job: the job; its key is the id of its line in the output.
        model: the model that it names.
    """

    job: Job
    model: str


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A line of a batch file that can have no line in the output.

    Attributes:
        number: the line's number.
        reason: what is wrong with it.
    """

    number: int
    reason: str


def each_request(
    path: Path, served: Mapping[str, Any], urls: Sequence[str] = URLS
) -> Generator[Request | Unusable, None, None]:
    """Yields the requests of a batch file one by one, so that a large file is never in memory as a whole.

    Args:
        path: the batch file.
        served: what tells this run from others, as JSON.
        urls: the endpoints that a request may name.

    Yields:
        Each request, or what is wrong with its line.
    """
    seen: set[str] = set()  # digests of custom_ids, which may be long
    with path.open("rb") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                _check_size(text)
                line = parse_line(text)
                seen.add(_check_custom_id(line, seen))
                name = digest([served, line])
            except (ValueError, RecursionError) as error:
                yield Unusable(number, str(error))
                continue
            body = line.get("body")
            yield Request(_job(line, name, number, urls), str(body.get("model") if isinstance(body, dict) else None))


def _check_size(text: bytes) -> None:
    """Refuses a line that the API would not read. Python's lock is held while its JSON is read: all else would wait."""
    for what, count, most in (
        ("bytes", len(text), MAX_BODY_BYTES),
        ("commas", text.count(b","), MAX_BODY_COMMAS),
        ("brackets", text.count(b"[") + text.count(b"{"), MAX_BODY_BRACKETS),
    ):
        if count > most:
            raise ValueError(f"the line has {count} {what}; at most {most} are read")


def _check_custom_id(line: Mapping[str, Any], seen: Container[str]) -> str:
    """Returns the digest of a line's custom_id. Raises ValueError if it has none, or one that an earlier line has."""
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be a string")
    if (short := digest(custom_id)) in seen:
        raise ValueError(f"the custom_id {custom_id[:64]!r} is there twice, and names the first line")
    return short


def _request(line: Mapping[str, Any], urls: Sequence[str]) -> bytes:
    """Checks a request and returns its body."""
    body = line.get("body")
    if line.get("method") != "POST" or line.get("url") not in urls:
        raise ValueError(f"method must be POST, and url {' or '.join(urls)}")
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if body.get("stream"):
        raise ValueError("body.stream is not possible in a batch")
    return encode(body)


def _job(line: Mapping[str, Any], name: str, number: int, urls: Sequence[str]) -> Job:
    line_id, custom_id = f"{_ID}{name}", line["custom_id"]

    def result(response: Line | None, error: Line | None) -> Line:
        return {"id": line_id, "custom_id": custom_id, "response": response, "error": error}

    def record(status: int, answer: Any) -> Line:
        if status < 500:
            return result({"status_code": status, "request_id": f"req_{name}", "body": answer}, None)
        said = answer.get("error") if isinstance(answer, dict) else None
        said = said if isinstance(said, dict) else {}
        code, message = said.get("code") or "server_error", said.get("message") or f"the server answered {status}"
        return result(None, {"code": str(code), "message": str(message)})

    try:
        return Job(line_id, line["url"], _request(line, urls), record, sequences=_sequences(line["body"]))
    except (ValueError, KeyError) as error:
        settled = result(None, {"code": "invalid_request", "message": f"line {number}: {error}"})
        return Job(line_id, "", b"", record, settled)


def _sequences(body: Mapping[str, Any]) -> int:
    """Returns how many sequences a request makes, if it is one that can be served."""
    n, models, prompt = body.get("n"), body.get("models"), body.get("prompt")
    texts = isinstance(prompt, list) and not all(type(token) is int for token in prompt)
    several = [len(values) for values in (models, prompt if texts else None) if isinstance(values, list)]
    return max(1, math.prod(several) * (n if type(n) is int else 1))


def is_answered(line: Line) -> bool:
    """Returns whether a line of the result file holds the answer to its request, and not an error."""
    return line["response"] is not None and line["response"]["status_code"] == 200
