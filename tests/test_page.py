"""The page at `/`, driven in a real Chromium as people do: by keyboard and pointer, on a phone and a desktop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browsers import chromium
from servers import Running, braked, running, until
from tokenswift_py import TokenSwift
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.jobs.jobs import Jobs
from tokenswift_py.serving.jobs.page import contents
from toys import save_tiny

CONTEXT = 8192
LONG = {"max_new_tokens": 6000, "ignore_eos": True, "on_loop": "ignore", "temperature": 1.0}


@pytest.fixture(autouse=True)
def brake(monkeypatch: pytest.MonkeyPatch) -> None:
    braked(monkeypatch)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    save_tiny(folder / "tiny", max_position_embeddings=CONTEXT)
    engine = Engine(TokenSwift.from_pretrained(str(folder / "tiny"), dtype="fp32", threads=1), CONTEXT)
    with running(engine, key="right", jobs=Jobs(engine, folder / "data")) as found:
        yield found


@pytest.fixture
def jobs(server: Running) -> Iterator[Jobs]:
    assert server.service.jobs is not None
    yield server.service.jobs
    for job in server.service.jobs.list():
        server.service.jobs.cancel(job.id)
        until(lambda job=job: job.over and not job.examined)
        server.service.jobs.delete(job.id)


@pytest.fixture
def page(browser: Any, server: Running, jobs: Jobs) -> Iterator[Any]:
    """The page with the key given. At the end: nothing was asked of anybody else, and nothing was complained of."""
    yield from opened(browser, server)


def opened(browser: Any, server: Running, **context: Any) -> Iterator[Any]:
    made = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    made.add_init_script("if (!sessionStorage.getItem('key')) sessionStorage.setItem('key', 'right');")
    page = made.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#write:visible")
    yield page
    assert {url for url in asked if not url.startswith((server.url, "data:", f"blob:{server.url}"))} == set()
    assert [what for what in wrong if "409 (Conflict)" not in what] == []  # that a job cannot do this now is shown
    made.close()


def open_job(page: Any, title: str) -> None:
    page.click(f"#list button:has-text('{title}')")
    page.wait_for_selector("#job:visible")


def text_of(page: Any) -> str:
    """Returns the text of the pane, as it was put there."""
    return str(page.eval_on_selector("#text", "pane => pane.textContent"))


@pytest.mark.browser
def test_a_text_is_written_by_keyboard_alone(page: Any, jobs: Jobs) -> None:
    keys = page.keyboard
    assert page.evaluate("document.activeElement.id") == "prompt"
    keys.type("the cat\nand the dog")
    keys.press("Tab")
    keys.press("Tab")
    keys.type("the bird\n\n  the rain  ")
    keys.press("Tab")
    keys.press("Control+a")
    keys.type("150")
    keys.press("Tab")
    keys.type("1")
    keys.press("Tab")
    keys.type("7")
    keys.press("Enter")
    page.wait_for_selector("#state:has-text('Finished')")
    (job,) = jobs.list()
    assert job.kept.asked == {
        "prompt": "the cat\nand the dog", "chapters": ["the bird", "the rain"], "max_tokens": 150, "temperature": 1.0,
        "seed": 7,
    }  # fmt: skip
    assert text_of(page) == job.written() != ""
    assert page.inner_text("#count") == f"{job.pace.tokens} of 150 tokens"
    page.reload()
    page.wait_for_selector("#state:has-text('Finished')")
    until(lambda: text_of(page) == job.written())


@pytest.mark.browser
def test_a_text_is_watched_while_it_comes(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Watched", **LONG)
    open_job(page, "Watched")
    page.wait_for_selector("#left:has-text('left')")
    page.wait_for_function("document.querySelector('#curve path').getAttribute('d').includes('L')")
    page.wait_for_selector("#plain:has-text('tokens/s')")
    assert float(page.get_attribute("#meter", "aria-valuenow")) > 0
    assert page.is_visible("[data-do=cancel]")
    assert not page.is_visible("[data-do=resume]")
    seen = len(text_of(page))
    until(lambda: len(text_of(page)) > seen)
    page.click("[data-do=cancel]")
    page.wait_for_selector("#state:has-text('Cancelled')")
    until(lambda: text_of(page) == job.written())
    page.click("[data-do=resume]")
    page.wait_for_selector("#state:has-text('Is being written')")
    until(lambda: len(text_of(page)) > seen)
    shown = text_of(page)
    assert job.written().startswith(shown)


@pytest.mark.browser
def test_what_was_done_to_a_text_elsewhere_is_seen(page: Any, jobs: Jobs) -> None:
    """In another tab, or by a program."""
    job = jobs.create("the cat", title="Shared", **LONG)
    open_job(page, "Shared")
    until(lambda: len(text_of(page)) > 100)
    jobs.cancel(job.id)
    page.wait_for_selector("#state:has-text('Cancelled')")
    seen = text_of(page)
    until(lambda: job.over)
    jobs.resume(job.id)
    page.wait_for_selector("#state:has-text('Is being written')")
    until(lambda: len(text_of(page)) > len(seen))
    assert text_of(page).startswith(seen)


@pytest.mark.browser
def test_a_refused_delete_leaves_the_text_as_it_was(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Kept", **LONG)
    open_job(page, "Kept")
    page.wait_for_selector("#state:has-text('Is being written')")
    page.once("dialog", lambda dialog: dialog.accept())
    page.eval_on_selector("[data-do=delete]", "button => { button.hidden = false; button.click(); }")
    page.wait_for_selector("#job-error:has-text('cancel it first')")
    seen = len(text_of(page))
    until(lambda: len(text_of(page)) > seen)
    assert not job.over


@pytest.mark.browser
def test_an_audit_leaves_the_reader_where_he_is(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Read on", **{**LONG, "max_new_tokens": 2000})
    until(lambda: job.over, 120)
    open_job(page, "Read on")
    until(lambda: text_of(page) == job.written())
    page.eval_on_selector("#text", "pane => { pane.scrollTop = 300; pane.firstChild.dataset.mine = 'yes'; }")
    page.click("[data-do=audit]")
    page.wait_for_selector("#verdict.good:has-text('PROVEN')")
    kept = page.eval_on_selector("#text", "pane => [pane.scrollTop, pane.firstChild.dataset.mine]")
    assert kept == [300, "yes"] and text_of(page) == job.written()


@pytest.mark.browser
def test_a_seed_of_63_bits_is_sent_to_the_digit(page: Any, jobs: Jobs) -> None:
    page.fill("#prompt", "the cat")
    page.fill("#max_tokens", "20")
    page.fill("#seed", str(2**63 - 25))
    page.keyboard.press("Enter")
    page.wait_for_selector("#job:visible")
    (job,) = jobs.list()
    assert job.kept.settings["seed"] == job.kept.asked["seed"] == 2**63 - 25


@pytest.mark.browser
def test_audit_download_and_delete(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Audited", **{**LONG, "max_new_tokens": 80})
    open_job(page, "Audited")
    page.wait_for_selector("#state:has-text('Finished: all tokens are written')")
    page.click("[data-do=audit]")
    page.wait_for_selector("#verdict.good:has-text('PROVEN')")
    assert "from steps that the audit timed" in page.inner_text("#plain")
    for name in ("text.txt", "report.json", "tokens.npy"):
        with page.expect_download() as download:
            page.click(f"[data-file='{name}']")
        assert download.value.suggested_filename == name
        assert Path(download.value.path()).read_bytes() == (job.folder / name).read_bytes()
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[data-do=delete]")
    page.wait_for_selector("#write:visible")
    assert jobs.list() == []
    assert page.query_selector_all("#list li") == []


@pytest.mark.browser
def test_loops_are_marked_along_the_text(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Round", logit_bias={"40": 100.0}, **{**LONG, "max_new_tokens": 300})
    until(lambda: job.over, 60)
    (loop,) = job.kept.loops
    job.kept.loops = [{**loop, "start": 75}, {"start": 10, "stop": 30, "period": 5}]
    open_job(page, "Round")
    page.wait_for_selector("#loops:visible")
    assert "tokens 75 to 300, tokens 10 to 30." in page.inner_text("#loops")
    marks = page.eval_on_selector_all("#marks span", "marks => marks.map(mark => parseFloat(mark.style.top))")
    assert marks == pytest.approx([25, 100 * 10 / 300], abs=0.01)


def reading(figures: list[float | None]) -> dict[str, Any]:
    """Returns what a job keeps of a reading: windows of 100 tokens with these perplexities, the last of which loops."""
    windows = [
        {"start": 100 * at, "stop": 100 * (at + 1), "perplexity": figure, "bits_per_byte": 1.25, "distinct_4": 0.875,
         "looping": at == len(figures) - 1}
        for at, figure in enumerate(figures)
    ]  # fmt: skip
    return {"median": 20.0, "worst": 81.0, "bits_per_byte_median": 1.25, "windows": len(windows), "window": 100,
            "per_window": windows, "at": 1.0}  # fmt: skip


@pytest.mark.browser
def test_windows_are_read_and_marked_along_the_text(page: Any, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The button has the text read; the figures stand in words, and the worst window leads to its place."""
    monkeypatch.setattr("tokenswift_py.quality.WINDOW", 200)
    job = jobs.create("the cat", title="Read", **{**LONG, "max_new_tokens": 550})
    until(lambda: job.over, 120)
    open_job(page, "Read")
    page.click("[data-do=quality]")
    page.wait_for_selector("#reads:has-text('the median of 2 windows of 200 tokens')")
    assert job.kept.quality is not None
    first, second = job.kept.quality["per_window"]
    worst = max((first, second), key=lambda window: window["perplexity"])
    place = f"tokens {worst['start']:,} to {worst['stop']:,}"
    assert f"The worst is {place}: {worst['perplexity']:.1f}." in page.inner_text("#reads")
    marks = page.eval_on_selector_all("#windows div", "marks => marks.map(mark => parseFloat(mark.style.top))")
    assert marks == pytest.approx([100 * window["start"] / job.pace.tokens for window in (first, second)], abs=0.01)
    page.click("#worst")
    assert place in page.inner_text("#window").lower()


# The line of text at the top of its pane.
TOP_LINE = """() => {
    const pane = document.getElementById("text").getBoundingClientRect();
    const { startContainer, startOffset } = document.caretRangeFromPoint(pane.left + 5, pane.top + 10);
    const text = startContainer.data;
    return text.slice(text.lastIndexOf("\\n", startOffset - 1) + 1).split("\\n")[0];
}"""


@pytest.mark.browser
def test_marks_of_windows_say_their_figures(page: Any, jobs: Jobs) -> None:
    job = jobs.create("the cat", title="Marks", **{**LONG, "max_new_tokens": 600})
    until(lambda: job.over, 60)
    job.kept.quality = reading([20.0, 8.0, 14.2, 28.2, 81.0, None])
    (job.folder / "text.txt").write_text("".join(f"{line}: the cat sat on the mat\n" for line in range(2400)))
    open_job(page, "Marks")
    page.wait_for_selector("#windows:visible")
    steps = page.eval_on_selector_all("#windows div", "marks => marks.map(mark => mark.className)")
    assert steps == ["read-2", "read-0", "read-1", "read-3", "read-4", "read-4"]
    colours = "marks => marks.map(mark => getComputedStyle(mark, '::after').backgroundColor)"
    assert len(set(page.eval_on_selector_all("#windows div", colours))) == 5
    assert "The worst is tokens 500 to 600: beyond measure." in page.inner_text("#reads")
    words = "Tokens 100 to 200: perplexity 8.00, 1.25 bits a byte, 88 % of its groups of four tokens differ"
    assert page.get_attribute("#windows div:nth-child(2)", "aria-label") == words
    assert page.get_attribute("#windows div:nth-child(2)", "title") == words
    assert page.get_attribute("#windows div:nth-child(6)", "title").endswith(", it loops")

    page.focus("#text")
    page.keyboard.press("Tab")
    for key, at in (("ArrowDown", 2), ("End", 6), ("ArrowUp", 5), ("ArrowDown", 6), ("Home", 1), ("ArrowDown", 2)):
        page.keyboard.press(key)
        assert page.evaluate(f"document.activeElement.matches('#windows div:nth-child({at})')")
    assert page.inner_text("#window") == words
    assert page.eval_on_selector_all("#windows [aria-selected=true]", "marks => marks.length") == 1
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    line = int(page.evaluate(TOP_LINE).split(":")[0])
    assert line == pytest.approx(2000, abs=80)  # five sixths of the text


MARKUP = "<img src=x onerror='document.title = \"taken\"'><b>bold</b>\n&amp; " * 400


@pytest.mark.browser
def test_what_is_written_is_never_markup(page: Any, jobs: Jobs) -> None:
    title = "<img src=x onerror='document.title = 1'>"
    job = jobs.create("the cat", title=title, **{**LONG, "max_new_tokens": 4})
    until(lambda: job.over)
    event = f"event: text\nid: {len(MARKUP)}\ndata: {json.dumps({'text': MARKUP, 'tokens': 4})}\n\n"
    end = f"event: end\ndata: {json.dumps({**job.status(), 'error': MARKUP[:50]})}\n\n"
    page.route(
        re.compile("/events"),
        lambda route: route.fulfill(body=event + end, headers={"Content-Type": "text/event-stream"}),
    )
    page.click("#list button")
    until(lambda: text_of(page) == MARKUP)
    assert page.inner_text("#job-title") == title
    assert MARKUP[:50] in page.inner_text("#state")
    assert page.query_selector_all("#main img, #main b") == []
    assert page.title() == "tokenswift"
    assert len(page.query_selector_all("#text > div")) > 3  # a long text is laid out in parts


@pytest.mark.browser
def test_the_policy_holds(browser: Any, server: Running) -> None:
    """Neither a script nor a style nor a request to anyone else gets through."""
    page = browser.new_page()
    page.goto(server.url)
    blocked = page.evaluate(
        """async () => {
            const found = [];
            document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "document.title = 'taken'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<i style='color: red' onclick='1'></i>");
            try { await fetch("http://127.0.0.1:9/"); } catch { found.push("fetch failed"); }
            await new Promise((go) => setTimeout(go, 50));
            return found;
        }"""
    )
    assert {"script-src-elem", "style-src-attr", "connect-src", "fetch failed"} <= set(blocked)
    assert page.title() == "tokenswift"
    page.close()


@pytest.mark.browser
def test_the_key_is_asked_for(browser: Any, server: Running) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#ask:visible")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong\n")
    page.wait_for_selector("#key-error:visible")
    page.keyboard.type("right\n")
    page.wait_for_selector("#write:visible")
    assert "tiny" in page.inner_text("#model")
    assert page.input_value("#key") == ""
    context.close()


@pytest.mark.browser
def test_a_refusal_is_told_in_the_form(browser: Any, server: Running) -> None:
    context = browser.new_context()
    context.add_init_script("sessionStorage.setItem('key', 'right');")
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#write:visible")
    page.fill("#prompt", "the cat")
    page.fill("#temperature", "1e9")
    page.click("#write button.first")
    page.wait_for_selector("#write-error:visible")
    assert "temperature" in page.inner_text("#write-error")
    assert page.input_value("#prompt") == "the cat"
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (820, "dark"), (1440, "light")])
def test_every_width_and_scheme(browser: Any, server: Running, jobs: Jobs, scheme: str, width: int) -> None:
    """Nothing is wider than the screen, every control has a name and shows its focus, and all text can be read."""
    job = jobs.create("the cat", title="A" * 60, **{**LONG, "max_new_tokens": 100})
    until(lambda: job.over)
    job.kept.quality = reading([20.0, 8.0, 81.0])
    for page in opened(browser, server, viewport={"width": width, "height": 700}, color_scheme=scheme):
        page.click("summary")
        for view in ("#write", "#job"):
            if view == "#job":
                open_job(page, "AAA")
                page.wait_for_selector("#state:has-text('Finished')")
                page.click("#worst")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(NAMELESS) == []
            assert page.evaluate(CONTRAST) == []
        page.evaluate("document.activeElement.blur()")
        for _ in range(6):
            page.keyboard.press("Tab")
            assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2


NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select")].filter((one) =>
    one.checkVisibility() && !one.textContent.trim() && !(one.labels && one.labels.length))
    .map((one) => one.outerHTML)"""

# The ratio of luminances (WCAG 2.2, 1.4.3): at least 4.5 for every visible text.
CONTRAST = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => parse(colour).slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if ((parse(colour)[3] ?? 1) === 1) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    return [...document.body.querySelectorAll("*")].filter((one) => one.checkVisibility()
        && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && one.tagName !== "SCRIPT")
        .map((one) => {
            const [a, b] = [light(getComputedStyle(one).color), light(ground(one))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.textContent.slice(0, 30)];
        }).filter(([ratio]) => ratio < 4.5);
}"""


def test_the_page_is_one_file() -> None:
    """Nothing in it names another place, but for the namespace of SVG."""
    html, policy = contents()
    text = html.decode()
    assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)) == [
        "http://www.w3.org"
    ]
    loaded = re.findall(r"\b(?:src|href|action)=[\"']?([^\"'\s>]+)", text)
    assert {url[:10] for url in loaded} == {"data:image", "#main"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|<\w+[^>]*\sstyle=", text)
    assert "unsafe" not in policy
