"""Jobs: long texts that a server goes on with, to the same bytes, whatever ended it."""

from __future__ import annotations

import json
import random
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from killed import Nursery
from servers import Running, braked, running, until
from tokenswift_py import TokenSwift
from tokenswift_py.cli.main import main
from tokenswift_py.errors import UserError
from tokenswift_py.quality import window_perplexity
from tokenswift_py.runs.journal import Journal
from tokenswift_py.serving.engine import Busy, Engine
from tokenswift_py.serving.jobs.job import Job
from tokenswift_py.serving.jobs.jobs import Jobs, NoSuchJob, WrongState
from tokenswift_py.serving.jobs.pace import CURVE_POINTS, Pace
from tokenswift_py.serving.jobs.page import contents
from tokenswift_py.text import special_ids

CONTEXT = 8192
DEEP: Any = reduce(lambda inner, _: {"a": inner}, range(400), 1)
ENDLESS = {"ignore_eos": True, "on_loop": "ignore", "temperature": 1.0}  # ends by length alone
LONG = {**ENDLESS, "max_new_tokens": 8000}  # see `braked`
CHAPTERS = {"chapters": ["the dog", "the bird"], "temperature": 1.0, "min_chapter_tokens": 4}


@pytest.fixture(autouse=True)
def brake(monkeypatch: pytest.MonkeyPatch) -> None:
    braked(monkeypatch)


@pytest.fixture
def engine(long_swift: TokenSwift) -> Iterator[Engine]:
    made = Engine(long_swift, CONTEXT, most_running=2)
    yield made
    made.close()


@pytest.fixture
def jobs(engine: Engine, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(engine, tmp_path / "data")
    yield made
    made.close()


def over(job: Job, state: str = "finished") -> Job:
    until(lambda: job.over and not job.examined)
    assert (job.state, job.kept.error) == (state, None)
    return job


def begun(job: Job, tokens: int = 50) -> Job:
    """With a journal that has tokens on the disk: synced at the latest a second after the first."""
    until(lambda: job.pace.tokens >= tokens)
    return job


def alone(long_swift: TokenSwift, job: Job, prompt: Any = "the cat", **settings: Any) -> Any:
    """The undisturbed run of the same request."""
    return long_swift.generate(prompt, context=CONTEXT, seed=job.kept.settings["seed"], **settings)


# Texts


@pytest.mark.parametrize("settings", [{**ENDLESS, "max_new_tokens": 150}, {**CHAPTERS, "max_new_tokens": 120}])
def test_a_job_ends_with_the_bytes_of_an_undisturbed_run(
    jobs: Jobs, long_swift: TokenSwift, settings: dict[str, Any]
) -> None:
    job = over(jobs.create("the cat", **settings))
    wanted = alone(long_swift, job, **settings)
    assert (job.folder / "text.txt").read_bytes() == wanted.text.encode() != b""
    assert np.load(job.folder / "tokens.npy").tolist() == wanted.tokens
    report = json.loads((job.folder / "report.json").read_text(encoding="utf-8"))
    assert (report["ending"], report["numerics"]) == (wanted.ending, wanted.report["numerics"])
    status = job.status()
    assert status["tokens"] == len(wanted.chosen)
    assert status["ending"] == wanted.ending
    assert status["characters"] == len(wanted.text)
    assert status["files"] == ["text.txt", "tokens.npy", "report.json", "journal.bin"]


def test_a_closed_server_goes_on_when_it_starts(engine: Engine, long_swift: TokenSwift, tmp_path: Path) -> None:
    """One in the engine, and one that waits."""
    first = Jobs(engine, tmp_path / "data", most_running=1)
    texts = [first.create("the cat", **{**ENDLESS, "max_new_tokens": 500}) for _ in range(2)]
    begun(texts[0])
    assert texts[1].state == "waiting"
    first.close()
    assert {job.state for job in texts} == {"interrupted"}
    second = Jobs(engine, tmp_path / "data")
    for job in texts:
        again = over(second.get(job.id))
        assert again.written() == alone(long_swift, job, **{**ENDLESS, "max_new_tokens": 500}).text
    assert second.get(texts[0].id).kept.settings == texts[0].kept.settings
    second.close()


@pytest.fixture(scope="module")
def nursery(long_folder: Path) -> Iterator[Nursery]:
    made = Nursery(long_folder, CONTEXT, running=4)
    yield made
    made.close()


def killed(nursery: Nursery, long_swift: TokenSwift, data: Path, texts: int, kills: int, tokens: int) -> None:
    """Jobs whose server is killed at random moments. Each ends in the bytes of an undisturbed run, and no synced token
    is lost or written twice: the journal is a record, which the audit of another test proves."""
    settings = {**ENDLESS, "max_new_tokens": tokens}
    engine = Engine(long_swift, CONTEXT, most_running=1)
    planned = Jobs(engine, data, most_running=1)
    prompts = [f"the cat and {'the dog ' * number}" for number in range(texts)]
    found = [planned.create(prompt, **settings) for prompt in prompts]
    planned.close()
    engine.close()
    whole = 4 * texts * tokens  # bytes of all tokens in journals
    for _ in range(kills):
        child = nursery.start(data)
        assert nursery.kill_at(data, child, random.randrange(1, whole // (kills + 1))) == -9
    nursery.start(data)
    assert nursery.end() == 0
    for job, prompt in zip(found, prompts, strict=True):
        kept = Job.read(job.folder)
        wanted = alone(long_swift, job, prompt, **settings)
        assert kept.state == "finished"
        assert kept.written() == wanted.text
        assert np.load(job.folder / "tokens.npy").tolist() == wanted.tokens


def test_a_killed_server_goes_on_to_the_same_bytes(nursery: Nursery, long_swift: TokenSwift, tmp_path: Path) -> None:
    killed(nursery, long_swift, tmp_path / "data", texts=2, kills=2, tokens=400)


@pytest.mark.soak
def test_twenty_kills_of_eight_jobs(nursery: Nursery, long_swift: TokenSwift, tmp_path: Path) -> None:
    killed(nursery, long_swift, tmp_path / "data", texts=8, kills=20, tokens=6000)


def test_a_job_whose_journal_never_began_begins(engine: Engine, long_swift: TokenSwift, tmp_path: Path) -> None:
    """A power cut leaves no journal, or one whose header is torn."""
    engine_of_nobody = Jobs(engine, tmp_path / "data", most_running=1)
    settings = {**ENDLESS, "max_new_tokens": 40}
    engine_of_nobody.create("the cat", **LONG)
    waiting = [engine_of_nobody.create("the cat", **settings) for _ in range(2)]
    engine_of_nobody.close()
    (waiting[1].folder / "journal.bin").write_bytes(b"tokenswift journal\n\xf5TSj\x01")
    second = Jobs(engine, tmp_path / "data", most_running=2)
    for job in waiting:
        assert over(second.get(job.id)).written() == alone(long_swift, job, **settings).text
    second.close()


# What can be done with jobs


def test_a_cancelled_job_resumes_to_the_same_bytes(jobs: Jobs, long_swift: TokenSwift) -> None:
    settings = {**ENDLESS, "max_new_tokens": 600}
    job = begun(jobs.create("the cat", **settings))
    over(jobs.cancel(job.id), "cancelled")
    part = job.written()
    assert 0 < job.pace.tokens < 600
    assert (job.folder / "text.txt").read_bytes() == part.encode()
    over(jobs.resume(job.id))
    wanted = alone(long_swift, job, **settings).text
    assert job.written() == wanted
    assert wanted.startswith(part)
    with pytest.raises(WrongState, match="finished"):
        jobs.resume(job.id)


def test_a_job_that_waits_is_cancelled_at_once(engine: Engine, tmp_path: Path) -> None:
    jobs = Jobs(engine, tmp_path / "data", most_running=1)
    first, second = (jobs.create("the cat", **LONG) for _ in range(2))
    begun(first)
    assert jobs.cancel(second.id).state == "cancelled"
    with pytest.raises(WrongState, match="cancel it first"):
        jobs.delete(first.id)
    jobs.delete(second.id)
    assert not second.folder.exists()
    with pytest.raises(NoSuchJob):
        jobs.get(second.id)
    jobs.close()


def test_an_urgent_job_does_not_wait(engine: Engine, tmp_path: Path) -> None:
    jobs = Jobs(engine, tmp_path / "data", most_running=1)
    begun(jobs.create("the cat", **LONG))
    waiting = jobs.create("the cat", **LONG)
    over(jobs.create("the dog", priority=5, **{**ENDLESS, "max_new_tokens": 20}))
    assert waiting.state == "waiting"
    jobs.close()


def test_an_answer_does_not_wait_for_jobs(engine: Engine, tmp_path: Path) -> None:
    """They take all places but one, and give way even where they were given all."""
    jobs = Jobs(engine, tmp_path / "data")
    one, two = (begun(jobs.create("the cat", **LONG)) if first else jobs.create("the cat", **LONG) for first in (1, 0))
    assert len(engine.submit("the bird", max_new_tokens=5, ignore_eos=True).result().tokens) == 5
    assert (one.state, two.state) == ("running", "waiting")
    jobs.close()
    jobs = Jobs(engine, tmp_path / "all", most_running=engine.most_running)
    full = [jobs.create("the cat", **LONG) for _ in range(engine.most_running)]
    for job in full:
        begun(job)
    assert len(engine.submit("the bird", max_new_tokens=5, ignore_eos=True).result().tokens) == 5
    assert not any(job.over for job in full)
    jobs.close()


def test_a_job_that_cannot_be_kept_cancelled_waits_on(engine: Engine, tmp_path: Path, monkeypatch: Any) -> None:
    """Or a server that starts again would write it after all."""
    jobs = Jobs(engine, tmp_path / "data", most_running=1)
    begun(jobs.create("the cat", **LONG))
    job = jobs.create("the cat", **LONG)
    with monkeypatch.context() as full:
        full.setattr(Job, "save", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            jobs.cancel(job.id)
    assert job.state == "waiting" and Job.read(job.folder).kept == job.kept
    assert jobs.cancel(job.id).state == "cancelled" == Job.read(job.folder).kept.state
    jobs.close()


def test_an_audit_proves_a_job_beside_another(jobs: Jobs) -> None:
    job = over(jobs.create("the cat", **{**CHAPTERS, "max_new_tokens": 120}))
    beside = begun(jobs.create("the dog", **LONG))
    over(jobs.audit(job.id, sample=1))
    found = job.status()["audit"]
    assert found["conclusion"].startswith("PROVEN")
    assert (found["passed"], found["checked"], found["faults"]) == (True, job.kept.tokens, [])
    assert found["ar_seconds"] is None  # measured beside another text it would be wrong
    assert not beside.over
    assert Job.read(job.folder).kept.audit == found


def test_an_audit_finds_a_changed_text(jobs: Jobs) -> None:
    job = over(jobs.create("the cat", **{**ENDLESS, "max_new_tokens": 60}))
    path = job.folder / "text.txt"
    path.write_text(path.read_text(encoding="utf-8") + "!", encoding="utf-8")
    over(jobs.audit(job.id))
    assert job.kept.audit is not None
    assert job.kept.audit["passed"] is False
    assert "text.txt" in job.kept.audit["faults"][0]
    assert job.kept.audit["ar_seconds"] > 0


def test_what_is_being_written_is_neither_audited_nor_read(jobs: Jobs) -> None:
    job = begun(jobs.create("the cat", **LONG))
    for what in (jobs.audit, jobs.read):
        with pytest.raises(WrongState, match="running"):
            what(job.id)


def test_the_windows_of_a_job_are_read_beside_another(
    jobs: Jobs, long_swift: TokenSwift, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of `tokenswift_py.quality` over the same tokens, and are kept."""
    monkeypatch.setattr("tokenswift_py.quality.WINDOW", 100)
    job = over(jobs.create("the cat", **{**ENDLESS, "max_new_tokens": 270}))
    beside = begun(jobs.create("the dog", **LONG))
    over(jobs.read(job.id))
    assert not beside.over
    found = job.status()["quality"]
    chosen = np.load(job.folder / "tokens.npy").tolist()
    wanted = window_perplexity(long_swift, chosen)
    assert {name: found[name] for name in wanted.summary()} == wanted.summary()
    assert [window["perplexity"] for window in found["per_window"]] == [
        pytest.approx(reading.perplexity, rel=1e-4) for reading in wanted.readings
    ]
    text = [place for place, token in enumerate(chosen) if token not in special_ids(long_swift.tokenizer)]
    places = [(window["start"], window["stop"]) for window in found["per_window"]]
    assert places == [(text[start], text[start + 99] + 1) for start in range(0, len(text) - 99, 100)]
    assert len(places) == 2
    assert Job.read(job.folder).kept.quality == found


def test_a_text_too_short_to_be_read_has_no_windows(jobs: Jobs) -> None:
    job = over(jobs.create("the cat", **{**ENDLESS, "max_new_tokens": 2}))
    over(jobs.read(job.id))
    assert job.kept.quality is not None
    assert (job.kept.quality["windows"], job.kept.quality["per_window"]) == (0, [])


def test_the_status_of_a_text_that_comes(jobs: Jobs) -> None:
    job = jobs.create("the cat", priority=1, title="A cat", **LONG)
    until(lambda: job.status()["eta_s"] and job.status()["plain_tokens_per_s"])
    status = job.status()
    assert (status["state"], status["title"], status["max_tokens"], status["ending"]) == (
        "running",
        "A cat",
        8000,
        None,
    )
    assert status["percent"] == pytest.approx(100 * status["tokens"] / 8000, abs=0.01)
    left = 8000 - status["tokens"]
    assert status["eta_s"] == pytest.approx(left / status["tokens_per_s"], rel=0.02)
    assert status["speedup"] > 0
    assert all(mean >= 1 for _, mean in status["curve"])


def test_a_full_disk_interrupts_and_resuming_goes_on(
    jobs: Jobs, long_swift: TokenSwift, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**ENDLESS, "max_new_tokens": 600}
    put, full = Journal._put, threading.Event()

    def no_room(journal: Journal, frame: bytes) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        put(journal, frame)

    monkeypatch.setattr(Journal, "_put", no_room)
    job = begun(jobs.create("the cat", **settings))
    full.set()
    until(lambda: job.over)
    assert job.state == "interrupted"
    assert "No space left" in str(job.kept.error)
    full.clear()
    jobs.resume(job.id)
    assert over(job).written() == alone(long_swift, job, **settings).text


def test_a_full_disk_takes_no_job_and_changes_none(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begun(jobs.create("the cat", **ENDLESS))
    jobs.cancel(job.id)
    until(lambda: job.over)
    kept = asdict(job.kept)

    def no_room(job: Job) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Job, "save", no_room)
        with pytest.raises(OSError, match="No space left"):
            jobs.create("the cat", **ENDLESS)
        with pytest.raises(OSError, match="No space left"):
            jobs.resume(job.id)
    assert (job.state, asdict(job.kept), jobs.list()) == ("cancelled", kept, [job])
    assert sorted(path.name for path in jobs.folder.iterdir()) == sorted(["lock", job.id])
    jobs.resume(job.id)
    jobs.cancel(job.id)


# Limits


@pytest.mark.parametrize(
    "name", ["", "..", "../data", "a" * 24 + "/", "/etc/passwd", "A" * 24, "0" * 23, "lock", "%2e%2e"]
)
def test_no_other_name_is_an_id(jobs: Jobs, name: str) -> None:
    with pytest.raises(NoSuchJob):
        jobs.get(name)


def test_the_folder_is_its_owners_alone(jobs: Jobs) -> None:
    job = jobs.create("the cat", max_new_tokens=4)
    for folder in (jobs.folder, job.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_has_one_server(engine: Engine, jobs: Jobs) -> None:
    with pytest.raises(UserError, match="no other server has"):
        Jobs(engine, jobs.folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_new_tokens": 10 * CONTEXT}, "context"),
        ({"temperature": -1}, "temperature"),
        ({"no_such": 1}, "no_such"),
        ({"trace": "file"}, "trace"),
        ({"title": "x" * 201}, "title"),
    ],
)
def test_what_cannot_be_written_is_no_job(jobs: Jobs, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        jobs.create("the cat", **settings)
    assert jobs.list() == []
    assert [path.name for path in jobs.folder.iterdir()] == ["lock"]


def test_more_jobs_than_may_be(engine: Engine, tmp_path: Path) -> None:
    jobs = Jobs(engine, tmp_path / "data", most_jobs=1)
    job = over(jobs.create("the cat", **{**ENDLESS, "max_new_tokens": 4}))
    with pytest.raises(Busy, match="delete some"):
        jobs.create("the cat", max_new_tokens=4)
    jobs.delete(job.id)
    jobs.create("the cat", max_new_tokens=4)
    jobs.close()
    with pytest.raises(Busy, match="stopping"):
        jobs.create("the cat", max_new_tokens=4)


def test_a_damaged_job_is_left_alone(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = tmp_path / "data" / ("0" * 24)
    damaged.mkdir(parents=True)
    (damaged / "job.json").write_text('{"created": 1')
    jobs = Jobs(engine, tmp_path / "data")
    assert jobs.list() == []
    assert "not whole" in caplog.text
    assert damaged.exists()
    jobs.close()


def test_a_curve_stays_small_and_keeps_its_mean() -> None:
    class Counts:
        stats = type("Stats", (), {"decode_ms": 0.0, "step_tokens": 0})
        loop = type("Loop", (), {"planner": type("Planner", (), {"target": type("Cost", (), {"measured": False})})})

    pace, ticks = Pace(clock=iter(range(10**6)).__next__), random.Random(1)
    gains = [ticks.choice((1, 2, 3)) for _ in range(20000)]
    for gain in gains:
        pace.hear(gain, Counts())  # type: ignore[arg-type]
    assert 20 <= len(pace.curve) <= CURVE_POINTS
    assert np.mean([mean for _, mean in pace.curve]) == pytest.approx(np.mean(gains), rel=0.05)
    assert pace.curve == sorted(pace.curve)
    assert pace.figures(10**6)["tokens_per_s"] == pytest.approx(np.mean(gains), rel=0.1)


# Over HTTP


@pytest.fixture
def server(long_swift: TokenSwift, tmp_path: Path) -> Iterator[Running]:
    engine = Engine(long_swift, CONTEXT, most_running=2)
    with running(engine, key="right", jobs=Jobs(engine, tmp_path / "data")) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer right"}, timeout=60) as made:
        yield made


def events(client: httpx.Client, name: str, **asked: Any) -> Iterator[tuple[str, str, Any]]:
    """(event, id, data) of a stream."""
    with client.stream("GET", f"/v1/jobs/{name}/events", **asked) as answer:
        assert answer.status_code == 200
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                field, _, value = line.partition(": ")
                fields[field] = value
            elif "event" in fields:
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}


def test_a_job_over_http(client: httpx.Client, long_swift: TokenSwift) -> None:
    body = {"prompt": "the cat", "max_tokens": 300, "ignore_eos": True, "on_loop": "ignore", "temperature": 1.0}
    made = client.post("/v1/jobs", json=body)
    assert made.status_code == 201
    job = made.json()
    heard = list(events(client, job["id"]))
    wanted = long_swift.generate("the cat", context=CONTEXT, seed=job["seed"], **{**ENDLESS, "max_new_tokens": 300})
    assert "".join(data["text"] for kind, _, data in heard if kind == "text") == wanted.text
    assert [kind for kind, _, _ in heard][-1] == "end"
    assert heard[-1][2]["state"] == "finished"
    ids = [int(place) for kind, place, _ in heard if kind == "text"]
    assert ids == sorted(ids)
    assert ids[-1] == len(wanted.text)

    middle = len(wanted.text) // 2
    asked = [{"params": {"offset": middle}}, {"headers": {"Last-Event-ID": str(middle)}, "params": {"offset": 3}}]
    for how in asked:
        later = [data["text"] for kind, _, data in events(client, job["id"], **how) if kind == "text"]
        assert "".join(later) == wanted.text[middle:]
    told = client.get(f"/v1/jobs/{job['id']}/text", params={"offset": middle}).json()
    assert (told["text"], told["next_offset"]) == (wanted.text[middle:], len(wanted.text))

    assert client.get("/v1/jobs").json()["data"][0]["id"] == job["id"]
    one = client.get(f"/v1/jobs/{job['id']}").json()
    assert one["asked"]["prompt"] == "the cat"
    assert client.get(f"/v1/jobs/{job['id']}/files/text.txt").content == wanted.text.encode()
    assert client.get(f"/v1/jobs/{job['id']}/files/report.json").json()["seed"] == job["seed"]
    assert client.post(f"/v1/jobs/{job['id']}/audit", json={"sample": 1}).status_code == 202
    assert list(events(client, job["id"]))[-1][2]["audit"]["conclusion"].startswith("PROVEN")
    assert client.post(f"/v1/jobs/{job['id']}/quality").status_code == 202
    assert list(events(client, job["id"]))[-1][2]["quality"]["windows"] == 1
    assert client.delete(f"/v1/jobs/{job['id']}").json()["deleted"] is True
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_one_reader_from_the_middle_while_it_is_written(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 1000, "ignore_eos": True}
    name = client.post("/v1/jobs", json={**body, "on_loop": "ignore", "temperature": 1.0}).json()["id"]
    until(lambda: client.get(f"/v1/jobs/{name}").json()["characters"] > 40)
    rest = "".join(data["text"] for kind, _, data in events(client, name, params={"offset": 20}) if kind == "text")
    assert rest == client.get(f"/v1/jobs/{name}/files/text.txt").content.decode()[20:]


def test_cancel_and_resume_over_http(client: httpx.Client) -> None:
    body = {"prompt": "the cat", "max_tokens": 1000, "ignore_eos": True, "on_loop": "ignore", "temperature": 1.0}
    name = client.post("/v1/jobs", json=body).json()["id"]
    until(lambda: client.get(f"/v1/jobs/{name}").json()["tokens"] > 20)
    assert client.post(f"/v1/jobs/{name}/resume").status_code == 409
    client.post(f"/v1/jobs/{name}/cancel")
    until(lambda: client.get(f"/v1/jobs/{name}").json()["state"] == "cancelled")
    assert client.post(f"/v1/jobs/{name}/resume").json()["state"] in ("waiting", "running")
    until(lambda: client.get(f"/v1/jobs/{name}").json()["state"] == "finished")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/v1/jobs/nothing", None, 404, "job"),
        ("GET", "/v1/jobs/..%2F..%2Fetc/text", None, 404, None),
        ("GET", f"/v1/jobs/{'0' * 24}/files/text.txt", None, 404, "job"),
        ("GET", f"/v1/jobs/{'0' * 24}/files/job.json", None, 400, None),
        ("POST", "/v1/jobs", {}, 400, "prompt"),
        ("POST", "/v1/jobs", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("POST", "/v1/jobs", {"prompt": "a", "model": "another"}, 404, "model"),
        ("POST", "/v1/jobs", {"prompt": "a", "max_tokens": 10**6}, 400, "max_tokens"),
        ("POST", "/v1/jobs", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("POST", "/v1/jobs", {"prompt": "a", "template_args": DEEP}, 400, "template_args"),
        ("POST", "/v1/jobs", {"prompt": [None] * 100_000}, 400, "prompt.0"),
        ("POST", f"/v1/jobs/{'0' * 24}/cancel", None, 404, "job"),
        ("DELETE", f"/v1/jobs/{'0' * 24}", None, 404, "job"),
    ],
)
def test_wrong_requests(
    client: httpx.Client, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert param in (None, error["param"])


def test_jobs_need_the_key_and_the_page_does_not(server: Running) -> None:
    with httpx.Client(base_url=server.url) as nobody:
        assert nobody.get("/v1/jobs").status_code == 401
        page = nobody.get("/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.content == contents()[0]


def test_a_stopped_server_goes_on_with_its_jobs(long_swift: TokenSwift, tmp_path: Path) -> None:
    """Stopping does not wait for jobs, and ends their streams."""
    body = {"prompt": "the cat", "max_tokens": 700, "ignore_eos": True, "on_loop": "ignore", "temperature": 1.0}
    engine = Engine(long_swift, CONTEXT)
    with running(engine, drain=30.0, jobs=Jobs(engine, tmp_path / "data")) as first:
        with httpx.Client(base_url=first.url, timeout=60) as client:
            job = client.post("/v1/jobs", json=body).json()
            until(lambda: client.get(f"/v1/jobs/{job['id']}").json()["tokens"] > 50)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    engine = Engine(long_swift, CONTEXT)
    with running(engine, jobs=Jobs(engine, tmp_path / "data")) as second, httpx.Client(base_url=second.url) as client:
        text = "".join(data["text"] for kind, _, data in events(client, job["id"], timeout=60) if kind == "text")
    settings = {**ENDLESS, "max_new_tokens": 700}
    assert text == long_swift.generate("the cat", context=CONTEXT, seed=job["seed"], **settings).text


def test_a_job_survives_in_its_folder_for_the_command_line(
    jobs: Jobs, long_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's folder is a run's folder: `tokenswift audit` reads it."""
    job = over(jobs.create("the cat", **{**ENDLESS, "max_new_tokens": 60}))
    assert main(["audit", str(job.folder), "--model", str(long_folder)]) == 0
    assert "PROVEN" in capsys.readouterr().out
