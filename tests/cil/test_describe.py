"""`spa-fast describe` against a server that misbehaves: bounded, resumable, and nothing bad is stored."""

from __future__ import annotations

import base64
import builtins
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import pytest
import torch
from chat_server import (
    ChatServer,
    Reply,
    completion,
    drip,
    error,
    good,
    half,
    of_class,
    reset,
    says,
    silence,
)
from PIL import Image

from spa_fast.cil.descriptions.budget import Budget, CostCap
from spa_fast.cil.descriptions.chat import Writer
from spa_fast.cil.descriptions.describe_config import DescribeConfig
from spa_fast.cil.descriptions.generate import describe
from spa_fast.cil.descriptions.lint import read_descriptions
from spa_fast.cil.descriptions.prompt import prompt_sha256
from spa_fast.cil.descriptions.select import select_exemplars
from spa_fast.cil.errors import RunError
from spa_fast.cli import main

ATTEMPTS = 4
KEY = "sk-test-0123456789-secret"
NAMES = ["amber", "blue", "coral", "dark red", "emerald", "fuchsia", "gold"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def writer(server, waits):
    return Writer("m", server.url, timeout=5, sleep=waits.append)


@pytest.fixture
def hasty(server, waits):
    return Writer("m", server.url, timeout=1, sleep=waits.append)


@pytest.fixture
def job(colours, server, tmp_path, backbone_config, waits):
    """Runs describe, one class after another; `.lines` is what it said last."""
    config = DescribeConfig(
        colours[0],
        "m",
        server.url,
        out=tmp_path / "out" / "d.json",
        exemplars=0,
        parallel=1,
        backbone=f"config:{backbone_config}",
        allow_upload=True,
    )
    config.out.parent.mkdir()

    def run(**changes):
        run.lines = []
        return describe(replace(config, **changes), run.lines.append, sleep=waits.append, timeout=5)

    run.out = config.out
    run.stored = lambda: json.loads(config.out.read_text())
    return run


# --- one class at a time: what is asked again, how long, and what it ends as


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        (says(None, refusal="I'm sorry, I cannot help with that."), "refused", "refused"),
        (says("I'm sorry, but I can't help with that."), "refused", "refused"),
        (
            says('{"descriptions": ["a", "b", "I’m sorry, I can’t describe it", "c", "d", "e"]}'),
            "refused",
            "",
        ),
        (says(None, finish="content_filter"), "refused", "content filter"),
        (says(""), "empty", "no text"),
        (says("   \n"), "empty", "no text"),
        (says('{"descriptions": []}'), "empty", "got 0"),
        (says('{"descriptions": ["a", "", "b", "c", "d", "e"]}'), "empty", "empty"),
        (Reply(200, {**completion(""), "choices": []}), "empty", "no answer"),
        (Reply(200, {}), "empty", "no answer"),
        (Reply(200, []), "empty", "no answer"),
        (Reply(200, {"choices": [{}]}), "empty", "no text"),
        (Reply(200, {"choices": {"0": 1}}), "empty", "no answer"),
        (says(["a list"]), "empty", "no text"),
        (says(good(5)), "failed", "expected 6 descriptions, got 5"),
        (says(good(9)), "failed", "expected 6 descriptions, got 9"),
        (says("- round edge\n- flat edge\n- dark edge"), "failed", "not the JSON"),
        (says(good().replace("round", "**round**")), "failed", "markup"),
        (says(good().replace("flat", "2. flat")), "failed", "markup"),
        (says(good().replace("flat", "<b>flat</b>")), "failed", "markup"),
        (says(good().replace("flat", "flat\\u0007")), "failed", "control character"),
        (says(json.dumps({"descriptions": [f"黄色い翼の縁 {i}" for i in range(6)]})), "failed", "English"),
        (says(json.dumps({"descriptions": [f"Flügel mit Rand {i}" for i in range(6)]})), "failed", "English"),
        (says(json.dumps({"descriptions": ["flat edge"] * 6})), "failed", "twice"),
        (says(json.dumps({"descriptions": ["very " * 60 + str(i) for i in range(6)]})), "failed", "40 words"),
        (says(good()[:-9]), "failed", "not the JSON"),
        (says(good()[:40], finish="length"), "failed", "longer than 4000 tokens"),
        (says('{"lines": ["a"]}'), "failed", "not the JSON"),
        (says('{"descriptions": [1, 2, 3, 4, 5, 6]}'), "failed", "not the JSON"),
        (Reply(200, b'{"choices": ['), "failed", "not JSON"),
        (Reply(200, b"<html>a proxy", {"Content-Type": "text/html"}), "empty", "no answer"),
        (error(429), "failed", "HTTP 429"),
        (error(500), "failed", "HTTP 500"),
        (error(503), "failed", "HTTP 503"),
        (Reply(502, b"<html>bad gateway", {"Content-Type": "text/html"}), "failed", "HTTP 502"),
        (error(408), "failed", "HTTP 408"),
        (reset(), "failed", "connection lost"),
        (half(), "failed", "connection lost"),
    ],
)
def test_a_bad_answer_is_asked_again_and_then_given_up(server, writer, waits, reply, status, reason):
    server.script = [reply]
    texts, got, why, answered = writer.ask("thing", 6, [])
    assert (texts, got) == ([], status)
    assert answered == (why != "connection lost" and "HTTP" not in why)
    assert reason in why
    assert len(server.requests) == ATTEMPTS
    server.script = [*[reply] * (ATTEMPTS + 1), says(good())]
    assert writer.ask("thing", 6, [])[1] == "ok"
    assert all(0 <= wait <= 8 for wait in waits)


def test_a_timeout_is_a_failure_like_others(server, hasty, waits):
    server.script = [silence(server.released), says(good())]
    start = time.perf_counter()
    assert hasty.ask("thing", 6, [])[1] == "ok"
    assert 0.9 < time.perf_counter() - start < 10
    assert waits == [1.0]
    server.script = [silence(server.released)]
    assert hasty.ask("thing", 6, []) == ([], "failed", "no answer in time", False)


def test_an_answer_in_drips_is_given_up_in_time(server, hasty):
    """Every byte comes within the timeout, the answer never."""
    server.script = [drip(server.released)]
    start = time.perf_counter()
    assert hasty.ask("thing", 6, []) == ([], "failed", "no answer in time", False)
    assert time.perf_counter() - start < 20


def test_backoff_doubles_and_retry_after_is_honoured(server, writer, waits):
    server.script = [error(500)]
    writer.ask("thing", 6, [])
    assert waits == [1, 2, 4]
    waits.clear()
    soon = formatdate(time.time() + 30, usegmt=True)
    later = [error(429, headers={"Retry-After": value}) for value in ("7", soon, "nonsense")]
    server.script = [*server.script * ATTEMPTS, *later, says(good())]
    assert writer.ask("thing", 6, [])[1] == "ok"
    assert waits[0] == 7
    assert 25 < waits[1] <= 30
    assert waits[2] == 4
    for value, wait in (("-5", 0), ("nan", 1)):
        waits.clear()
        server.requests.clear()
        server.script = [error(429, headers={"Retry-After": value}), says(good())]
        writer.ask("thing", 6, [])
        assert waits == [wait]
    server.script = [error(429, headers={"Retry-After": "3600"})]
    with pytest.raises(RunError, match="asks to wait 3600 s: run the same command again then"):
        writer.ask("thing", 6, [])


def test_a_writer_that_is_stopped_asks_no_more(server, waits):
    def stop(seconds):
        waits.append(seconds)
        writer.stop()

    writer = Writer("m", server.url, sleep=stop)
    server.script = [error(500)]
    assert writer.ask("thing", 6, []) == ([], "failed", "HTTP 500", False)
    assert waits == [1]
    assert len(server.requests) == 1
    # By default it waits no longer than that, whatever the server asks for.
    server.script = [error(429, headers={"Retry-After": "100"})]
    start = time.perf_counter()
    writer = Writer("m", server.url)
    threading.Timer(0.3, writer.stop).start()
    assert writer.ask("thing", 6, [])[2] == "HTTP 429"
    assert time.perf_counter() - start < 20


def test_the_model_is_told_what_was_wrong(server, writer):
    server.script = [says(good(3)), says(good())]
    writer.ask("thing", 6, [])
    assert "could not be used" not in server.text(0)
    assert "expected 6 descriptions, got 3" in server.text(1)


def test_fenced_json_is_read(server, writer):
    server.script = [says(f"```json\n{good()}\n```")]
    assert writer.ask("thing", 6, [])[1] == "ok"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(401, "invalid_api_key", f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY: not accepted"),
        (error(403), "OPENAI_API_KEY: not accepted"),
        (error(404, "model_not_found", "The model m does not exist"), "--model: 'm' is not at"),
        (error(400, "invalid_image"), "refuses the request"),
        (error(413), "refuses the request"),
        (error(429, "insufficient_quota"), "quota is used up"),
    ],
)
def test_what_no_further_request_can_mend_ends_the_run_at_once(server, writer, reply, message):
    server.script = [reply]
    with pytest.raises(RunError, match=message) as caught:
        writer.ask("thing", 6, [])
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)


def test_a_redirect_is_not_followed(server, writer):
    elsewhere = ChatServer()
    try:
        server.script = [Reply(307, {}, {"Location": f"{elsewhere.url}/chat/completions"})]
        with pytest.raises(RunError, match="refuses the request"):
            writer.ask("thing", 6, [b"image"])
        assert not elsewhere.requests
    finally:
        elsewhere.close()


def test_a_filtered_request_is_not_repeated(server, writer):
    server.script = [error(400, "content_filter")]
    assert writer.ask("thing", 6, []) == ([], "refused", "content filter", True)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", [None, "", "  ", "two words", "line\nbreak", "sch\u00fcssel"])
def test_a_missing_or_broken_key_is_named_before_any_request(server, job, monkeypatch, key):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(RunError, match=r"OPENAI_API_KEY: (not set|expected)"):
        job()
    assert not server.requests
    assert not job.out.exists()


@pytest.mark.parametrize(
    "url", ["ftp://x", "localhost:8000", "https://user:pw@host/v1", "https://host/v1?key=1", "http://"]
)
def test_an_address_that_is_none(server, url):
    with pytest.raises(RunError, match="--base-url") as caught:
        Writer("m", url)
    assert "pw" not in str(caught.value)


def test_nobody_listens(monkeypatch, server, waits):
    closed = ChatServer()
    url = closed.url
    closed.close()
    closed_off = Writer("m", url, sleep=waits.append)
    assert closed_off.ask("thing", 6, []) == ([], "failed", "connection lost", False)


# --- whole files


def test_a_whole_run_is_usable_by_train(job, server, colours, waits):
    assert job() == 0
    texts = read_descriptions(job.out, NAMES)
    assert [len(lines) for lines in texts] == [6] * 7
    document = job.stored()
    assert document["schema"] == "spa_fast.descriptions/1"
    assert document["generator"]["model"] == "m"
    assert document["generator"]["prompt_sha256"] == prompt_sha256()
    assert len(document["generator"]["date"]) == 10
    assert [(c["id"], c["name"], c["status"]) for c in document["classes"]] == [
        (i, name, "ok") for i, name in enumerate(NAMES)
    ]
    assert sorted(p.name for p in job.out.parent.iterdir()) == ["d.json"]
    assert any("7000 tokens sent, 700 answered" in line for line in job.lines)


def test_what_is_sent(job, server, colours, backbone):
    photo = colours[0] / "train" / "blue" / "0.png"
    exif = Image.Exif()
    exif[0x0110] = "camera of mine"
    Image.effect_noise((1500, 700), 50).convert("RGB").save(photo, exif=exif)
    assert job(exemplars=3) == 0
    request = server.requests[1]
    assert server.headers[1][":path"] == "/v1/chat/completions"
    assert request["response_format"]["json_schema"]["strict"] is True
    assert request["response_format"]["json_schema"]["schema"]["additionalProperties"] is False
    text, *images = request["messages"][1]["content"]
    assert "'blue'" in text["text"]
    assert len(images) == 3
    for part in images:
        assert part["image_url"]["detail"] == "low"
        raw = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(raw)) as image:
            assert max(image.size) <= 512
            assert not image.getexif()
        assert b"camera" not in raw
    stored = job.stored()["classes"][1]["images"]
    files = sorted((colours[0] / "train" / "blue").iterdir())
    by_hash = {hashlib.sha256(f.read_bytes()).hexdigest(): f for f in files}
    assert set(stored) <= set(by_hash)
    pixels = [backbone.preprocess(Image.open(f).convert("RGB")) for f in files]
    features = backbone.encode_images(torch.stack(pixels))[0]
    assert [files.index(by_hash[h]) for h in stored] == select_exemplars(features, 3)


def test_the_estimate_needs_no_key(job, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert job(allow_upload=False, exemplars=5, prices=(1.0, 10.0)) == 1
    assert f"leave this machine for m at {server.url}" in job.lines[1]
    assert "about $0.0" in job.lines[2]
    with pytest.raises(RunError, match="OPENAI_API_KEY: not set"):
        job()
    assert not server.requests


def test_extraction_says_what_it_does(job):
    assert job(exemplars=2) == 0
    assert any(line.startswith("features: ") for line in job.lines)


def test_nothing_leaves_without_consent(job, server):
    assert job(allow_upload=False, exemplars=5, prices=(1.0, 10.0)) == 1
    assert not server.requests
    assert not job.out.exists()
    text = "\n".join(job.lines)
    assert f"35 images and the class names of 7 classes leave this machine for m at {server.url}" in text
    assert "about $0.0" in text
    assert "nothing was sent: add --allow-upload (or --yes)" in text


def test_refusals_are_never_stored_and_the_next_run_asks_only_for_them(job, server):
    refusal = "I'm sorry, I cannot help with that."

    def answer(request):
        name = request["messages"][1]["content"][0]["text"]
        return says(None, refusal=refusal) if "coral" in name or "gold" in name else says(good())

    server.script = [answer]
    assert job() == 1
    assert "sorry" not in job.out.read_text()
    states = {c["name"]: (c["status"], c["descriptions"]) for c in job.stored()["classes"]}
    assert states["coral"] == states["gold"] == ("refused", [])
    assert any("2 classes without text" in line for line in job.lines)
    with pytest.raises(RunError, match=r"class 'coral' has no descriptions \(refused: the model refused\)"):
        read_descriptions(job.out, NAMES)
    asked = len(server.requests)
    server.script = [says(good())]
    assert job() == 0
    assert len(server.requests) == asked + 2
    assert job() == 0
    assert len(server.requests) == asked + 2


def test_texts_written_by_hand_are_kept(job, server):
    server.script = [says("")]
    assert job() == 1
    document = job.stored()
    for entry in document["classes"]:
        entry.update(status="manual", descriptions=[f"mine {entry['id']}"], reason="")
    job.out.write_text(json.dumps(document))
    asked = len(server.requests)
    assert job() == 0
    assert len(server.requests) == asked
    assert read_descriptions(job.out, NAMES)[0] == ["mine 0"]


def test_classes_keep_the_date_of_their_texts(job, server, monkeypatch):
    from spa_fast.cil.descriptions import generate

    monkeypatch.setattr(generate, "_today", lambda: "2026-01-01")
    server.script = [*[of_class] * 3, says("")]
    assert job() == 1
    monkeypatch.setattr(generate, "_today", lambda: "2026-02-02")
    server.script = [of_class]
    assert job() == 0
    stored = job.stored()
    assert stored["generator"]["date"] == "2026-01-01"
    assert [c["date"] for c in stored["classes"]] == ["2026-01-01"] * 3 + ["2026-02-02"] * 4


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_it_goes_on_where_it_stopped(job, server, monkeypatch, stop):
    from spa_fast.cil.descriptions import generate

    write = generate.write_descriptions

    def fails_at_the_fourth(path, document):
        if document.classes[3].status == "ok":
            raise stop
        write(path, document)

    monkeypatch.setattr(generate, "write_descriptions", fails_at_the_fourth)
    with pytest.raises(stop):
        job()
    monkeypatch.setattr(generate, "write_descriptions", write)
    assert [c["status"] for c in job.stored()["classes"]] == ["ok"] * 3 + ["pending"] * 4
    assert job() == 0
    assert len(server.requests) == 4 + 4


def test_a_full_disk_leaves_the_earlier_file(job, server, monkeypatch):
    job()
    document = job.stored()
    document["classes"][0].update(status="pending", descriptions=[])
    job.out.write_text(json.dumps(document))
    before = job.out.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        job()
    assert job.out.read_bytes() == before
    assert [p.name for p in job.out.parent.iterdir()] == ["d.json"]


def test_other_settings_do_not_mix_into_one_file(job, server, tmp_path):
    job()
    for change, word in (
        ({"model": "n"}, "model 'm'"),
        ({"n_descriptions": 5}, "params"),
        ({"exemplars": 2}, "params"),
    ):
        with pytest.raises(RunError, match=f"was written with {word}"):
            job(**change)
    names = tmp_path / "names.json"
    folders = ["amber", "blue", "coral", "dark_red", "emerald", "fuchsia", "gold"]
    names.write_text(json.dumps({folder: f"shade {folder}" for folder in folders}))
    with pytest.raises(RunError, match="is of other classes"):
        job(classnames=names)
    job.out.write_bytes(job.out.read_bytes()[:300])
    with pytest.raises(RunError, match=r"--out: .*d\.json: .*truncated"):
        job()


def test_a_server_that_is_down_does_not_cost_an_hour(job, server):
    server.script = [says(good()), reset()]
    with pytest.raises(RunError, match=r"no answer for 3 classes in a row \(connection lost\)"):
        job()
    assert len(server.requests) <= 1 + 3 * ATTEMPTS
    assert [c["status"] for c in job.stored()["classes"]] == ["ok", *["failed"] * 3, *["pending"] * 3]


def test_useless_answers_are_not_a_server_that_is_down(job, server):
    server.script = [says("")]
    assert job() == 1
    assert {c["status"] for c in job.stored()["classes"]} == {"empty"}


def test_the_cost_cap_stops_before_it_is_passed(job, server):
    # A request may cost up to 4000 tokens of answer: $0.04; one that came cost $0.002.
    with pytest.raises(RunError, match=r"--max-cost: \$0\.0080 spent, the next request could pass \$0\.047"):
        job(prices=(1.0, 10.0), max_cost=0.047)
    assert [c["status"] for c in job.stored()["classes"]].count("ok") == 4 == len(server.requests)
    assert job(prices=(1.0, 10.0), max_cost=1.0) == 0
    assert any("$0.0060" in line for line in job.lines)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -5, "completion_tokens": "many"}])
def test_answers_without_usage_count_as_the_longest(server, usage):
    server.script = [Reply(200, {**completion(good()), "usage": usage})]
    budget = Budget()
    Writer("m", server.url, budget=budget).ask("thing", 6, [])
    assert budget.used[1] == 4000
    assert budget.used[0] > 50


def test_an_answer_that_comes_too_late_is_counted(server, waits):
    budget = Budget()
    server.script = [silence(server.released), says(good())]
    Writer("m", server.url, budget=budget, timeout=1, sleep=waits.append).ask("thing", 6, [])
    assert budget.used[1] == 4000 + 100


def test_two_commands_do_not_write_one_file(job, server):
    busy = threading.Event()

    def slow(request):
        busy.set()
        server.released.wait(10)
        return says(good())

    server.script = [slow, says(good())]
    first = threading.Thread(target=lambda: describe_quietly(job))
    first.start()
    try:
        assert busy.wait(10)
        with pytest.raises(RunError, match="is being written by another command"):
            job()
    finally:
        server.released.set()
        first.join()


def describe_quietly(job):
    job(allow_upload=True)


def test_the_key_is_in_no_file_and_no_line(job, server, caplog):
    server.script = [error(500, message=f"bad key {KEY}"), says(good())]
    with caplog.at_level("DEBUG"):
        assert job(exemplars=2) == 0
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in "\n".join(job.lines) + caplog.text
    for path in job.out.parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


# --- several classes at a time


def together(count):
    """A reply that waits until `count` requests are there at the same time."""
    barrier = threading.Barrier(count)

    def answer(request):
        barrier.wait(20)
        return of_class(request)

    return answer


def test_classes_are_asked_for_together(job, server):
    """One after another, the first would wait for ever; every class gets its own texts."""
    server.script = [together(3)] * 6 + [of_class]
    assert job(parallel=3, exemplars=2) == 0
    assert len(server.requests) == 7
    texts = read_descriptions(job.out, NAMES)
    for name, lines in zip(NAMES, texts, strict=True):
        assert hashlib.sha256(name.encode()).hexdigest()[:8] in lines[0]
    images = [tuple(c["images"]) for c in job.stored()["classes"]]
    assert len(set(images)) == 7
    counts = [line.partition("]")[0] for line in job.lines if line.startswith("[")]
    assert counts == [f"[{i}/7" for i in range(1, 8)]


def test_no_more_than_asked_for_at_a_time(job, server):
    running, most, lock = [0], [0], threading.Lock()

    def answer(request):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return of_class(request)

    server.script = [answer]
    assert job(parallel=2) == 0
    assert most == [2]


def test_each_class_is_asked_again_on_its_own(job, server, waits):
    """Half of the requests fail somehow; in the end every class has texts, and nothing was asked twice."""
    seen: dict[str, int] = {}
    faults = [error(429), error(500), reset(), half(), says(""), says(good(3)), error(503)]

    def answer(request):
        name = request["messages"][1]["content"][0]["text"].partition("class '")[2].partition("'")[0]
        seen[name] = seen.get(name, 0) + 1
        return faults[NAMES.index(name)] if seen[name] == 1 else of_class(request)

    server.script = [answer]
    assert job(parallel=4) == 0
    assert seen == dict.fromkeys(NAMES, 2)
    assert waits == [1.0] * 5


def test_answers_under_way_are_stored_when_a_run_ends(job, server):
    both, refused = threading.Barrier(2), threading.Event()

    def answer(request):
        both.wait(20)
        if "'amber'" in request["messages"][1]["content"][0]["text"]:
            refused.set()
            return error(401)
        refused.wait(20)
        time.sleep(0.2)
        return of_class(request)

    server.script = [answer]
    with pytest.raises(RunError, match="OPENAI_API_KEY: not accepted"):
        job(parallel=2)
    assert [c["status"] for c in job.stored()["classes"]] == ["pending", "ok", *["pending"] * 5]
    assert len(server.requests) == 2


def test_an_image_that_cannot_be_read_ends_the_run_after_what_is_under_way(job, server, colours):
    job(parallel=1, exemplars=6)
    job.out.unlink()
    photo = colours[0] / "train" / "coral" / "0.png"
    size, times = photo.stat().st_size, photo.stat()
    photo.write_bytes(b"\x89PNG" + bytes(size - 4))
    os.utime(photo, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RunError, match=r"coral/0\.png"):
        job(parallel=3, exemplars=6)
    assert [c["status"] for c in job.stored()["classes"]] == ["ok", "ok", *["pending"] * 5]


def test_the_cost_cap_holds_for_all_together(job, server):
    """$0.041 a request at most: two under way would pass the cap, and one waits for what the other leaves."""
    running, most, lock = [0], [0], threading.Lock()

    def answer(request):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return of_class(request)

    server.script = [answer]
    with pytest.raises(CostCap, match=r"\$0\.0080 spent, the next request could pass \$0\.047"):
        job(parallel=4, prices=(1.0, 10.0), max_cost=0.047)
    assert [c["status"] for c in job.stored()["classes"]].count("ok") == 4
    assert most == [1]
    assert job(parallel=4, prices=(1.0, 10.0), max_cost=1.0) == 0


def test_a_server_that_is_down_is_noticed_by_all(job, server):
    server.script = [says(good()), reset()]
    with pytest.raises(RunError, match=r"no answer for 3 classes in a row"):
        job(parallel=2)
    assert len(server.requests) <= 1 + 5 * ATTEMPTS
    statuses = [c["status"] for c in job.stored()["classes"]]
    assert statuses.count("ok") == 1
    assert statuses.count("pending") >= 2


@pytest.fixture
def process(colours, server, tmp_path):
    """A describe command in a process of its own that waits for a server that has fallen silent."""
    out = tmp_path / "out of it" / "d.json"
    out.parent.mkdir()
    args = ["describe", "--data", str(colours[0]), "--model", "m", "--base-url", server.url, "--yes"]
    args += ["--exemplars", "0", "--out", str(out)]

    def start(answered, *extra):
        server.script = [*[of_class] * answered, silence(server.released)]
        command = [sys.executable, "-m", "spa_fast.cli", *args, *extra]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 120
        parallel = int(extra[-1]) if extra else 4
        while len(server.requests) < answered + parallel and time.monotonic() < deadline:
            time.sleep(0.05)
        while answered and (not out.exists() or out.read_text().count('"ok"') < answered):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    started: list[subprocess.Popen] = []
    start.args, start.out = args, out
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("answered", "words"),
    [
        (3, "3 of 7 classes are stored in {out}; the same command asks for the others"),
        (0, "no class is described yet: {out} was not written"),
    ],
)
def test_an_interrupt_leaves_at_once_and_says_what_is_stored(process, server, number, answered, words):
    """Not after the 60 s that the silent server may take, and nothing is said of run folders."""
    running = process(answered)
    start = time.monotonic()
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert running.returncode == 130
    assert stderr == f"spa-fast: interrupted; {words.format(out=process.out)}\n"
    assert [p.name for p in process.out.parent.iterdir()] == ["d.json"] * bool(answered)
    asked = len(server.requests)
    server.script = [of_class]
    assert main(process.args) == 0
    assert len(server.requests) == asked + 7 - answered


def test_killed_in_the_middle_it_goes_on(process, server):
    """SIGKILL, as by a full machine: the file is whole, and only what is missing is asked again."""
    running = process(3, "--parallel", "1")
    running.kill()
    running.wait()
    statuses = [entry["status"] for entry in json.loads(process.out.read_text())["classes"]]
    assert statuses == ["ok"] * 3 + ["pending"] * 4
    server.script = [of_class]
    assert main(process.args) == 0
    assert len(server.requests) == 4 + 4


# --- no model at all, and the command line


def test_from_template_needs_neither_key_nor_network(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    args = ["describe", "--data", str(colours[0]), "--from-template"]
    assert main(args) == 0
    out = tmp_path / "colours_descriptions.json"
    assert [len(lines) for lines in read_descriptions(out, NAMES)] == [6] * 7
    assert main(["descriptions", "lint", str(out)]) == 0
    assert "every class has the same texts" in capsys.readouterr().out
    assert main(args) == 2
    assert "exists" in capsys.readouterr().err


def test_the_command(colours, server, tmp_path, backbone_config, capsys):
    out = tmp_path / "d.json"
    args = ["describe", "--data", str(colours[0]), "--model", "m", "--base-url", server.url]
    args += ["--out", str(out), "--backbone", f"config:{backbone_config}"]
    assert main(args) == 1
    assert not out.exists()
    assert main([*args, "--yes"]) == 0
    assert "[7/7] " in (said := capsys.readouterr().out)
    assert "] gold: ok" in said
    assert main(["descriptions", "lint", str(out)]) == 0


def test_without_the_extra(job, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.split(".")[0] == "openai":
            raise ModuleNotFoundError("No module named 'openai'", name="openai")
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "spa_fast.cil.descriptions.chat")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RunError, match=r"openai is not installed: pip install 'spa_fast\[describe\]'"):
        job()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ((), "expected --model NAME or --from-template"),
        (("--model", "m", "--from-template"), "expected --model NAME or --from-template"),
        (("--model", "m", "--n-descriptions", "0"), "n_descriptions: expected at least 1"),
        (("--from-template", "--n-descriptions", "7"), "n_descriptions"),
        (("--model", "m", "--exemplars", "-1"), "exemplars: expected at least 0"),
        (("--model", "m", "--parallel", "0"), "parallel: expected at least 1"),
        (("--model", "m", "--max-cost", "1"), "--max-cost: needs --prices"),
        (("--model", "m", "--prices", "nan", "1"), "--prices"),
        (("--from-template", "--out", "/nowhere/at/all.json"), "--out: no such folder"),
    ],
)
def test_refused_arguments(colours, capsys, monkeypatch, tmp_path, extra, words):
    monkeypatch.chdir(tmp_path)
    assert main(["describe", "--data", str(colours[0]), *extra]) == 2
    assert words in capsys.readouterr().err
