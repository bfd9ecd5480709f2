"""TokenSwift.generate and .stream, on a tiny checkpoint."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, TemperatureLogitsWarper

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.errors import check_new
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models import executors
from tokenswift_py.models.rope import rope_bytes, rope_tables
from tokenswift_py.runs import plan
from tokenswift_py.runs.journal import read
from tokenswift_py.runs.report import baseline_figures, run_figures, summary
from toys import save_tiny


def cache_bytes(swift: TokenSwift, tokens: int) -> int:
    """The bytes that the pages of so many tokens really take."""
    pool = swift.executor.model(rope_tables(swift.checkpoint.config, 64)).new_pool(1)
    return pages_for(tokens) * pool.page_bytes


@pytest.fixture(scope="module", params=["native", "torch"])
def swift(tiny_folder: Path, request: pytest.FixtureRequest) -> TokenSwift:
    if request.param == "native":
        pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=request.param)


def test_greedy_text_is_hugging_faces(swift: TokenSwift, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = swift.tokenizer("the cat and", return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=[], pad_token_id=0, top_p=None,
                              temperature=None)[0, ids.shape[1]:].tolist()  # fmt: skip
    result = swift.generate("the cat and", raw=True, temperature=0, max_new_tokens=40, ignore_eos=True)
    assert result.tokens == expected
    assert result.text == swift.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("drafter", ["none", "ngram", "partial"])
def test_a_stream_joins_to_the_result(swift: TokenSwift, drafter: str) -> None:
    with swift.stream("the dog", max_new_tokens=120, seed=5, drafter=drafter, ignore_eos=True) as stream:
        pieces = list(stream)
        result = stream.result()
    assert "".join(piece.text for piece in pieces) == result.text
    assert [token for piece in pieces for token in piece.tokens] == result.tokens
    assert result.text == swift.tokenizer.decode(result.tokens, skip_special_tokens=True)
    assert result.tokens == swift.generate("the dog", max_new_tokens=120, seed=5, ignore_eos=True).tokens


def test_the_checkpoints_defaults_hold_until_something_else_is_asked(swift: TokenSwift) -> None:
    parameters = swift.generate("a", max_new_tokens=2).report["parameters"]
    assert (parameters["temperature"], parameters["top_p"]) == (0.7, 0.9)
    parameters = swift.generate("a", max_new_tokens=2, top_p=1.0).report["parameters"]
    assert (parameters["temperature"], parameters["top_p"]) == (0.7, 1.0)


def test_a_recorded_seed_writes_the_same_text_again(swift: TokenSwift) -> None:
    first = swift.generate("the rain", max_new_tokens=30)
    again = swift.generate("the rain", max_new_tokens=30, seed=first.report["seed"])
    assert first.tokens == again.tokens
    assert swift.generate("the rain", max_new_tokens=30, seed=first.report["seed"] ^ 1).tokens != first.tokens
    assert swift.generate("the rain", max_new_tokens=30, seed=first.report["seed"], stream=1).tokens != first.tokens


def test_prompts_as_text_messages_and_ids(swift: TokenSwift) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 10, "seed": 1}
    text = swift.generate("the cat", **settings)
    messages = swift.generate([{"role": "user", "content": "the cat"}], **settings)
    ids = swift.generate(swift.tokenizer("the cat").input_ids, **settings)
    assert text.tokens == messages.tokens
    assert ids.tokens == swift.generate("the cat", raw=True, **settings).tokens


def test_log_probabilities_are_the_models_own(swift: TokenSwift, tiny_folder: Path) -> None:
    result = swift.generate("the bird", raw=True, max_new_tokens=20, seed=3, logprobs=True, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompt = swift.tokenizer("the bird").input_ids
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + result.tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    expected = rows[torch.arange(20), torch.tensor(result.tokens)]
    assert result.logprobs is not None
    assert (torch.tensor(result.logprobs, dtype=torch.float64) - expected).abs().max() < 1e-4


def test_chapters(swift: TokenSwift) -> None:
    """Every chapter ends at an EOS, the turn between is the chat template's, and the text leaves it out."""
    bias = {2: 6.0}
    result = swift.generate("a", max_new_tokens=200, seed=2, chapters=["and then", "the rain"], logit_bias=bias)
    turn = swift.tokenizer("\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\n").input_ids
    start, stop = result.forced[0]
    assert result.tokens[start:stop] == turn
    assert result.tokens[start - 1] in (0, 2)
    assert len(result.forced) == 2
    assert result.ending == "eos"
    assert len(result.chosen) == len(result.tokens) - sum(stop - start for start, stop in result.forced)
    assert result.text.count("\n\n") >= 2
    assert "im_start" not in result.text
    for drafter in ("none", "partial"):
        other = swift.generate("a", max_new_tokens=200, seed=2, chapters=["and then", "the rain"], logit_bias=bias,
                               drafter=drafter)  # fmt: skip
        assert (other.text, other.tokens, other.forced) == (result.text, result.tokens, result.forced)


def test_a_stop_string_ends_the_text_before_it(swift: TokenSwift) -> None:
    whole = swift.generate("the cat", max_new_tokens=80, seed=9, ignore_eos=True).text
    stop = whole[30:33]
    with swift.stream("the cat", max_new_tokens=80, seed=9, ignore_eos=True, stop=[stop]) as stream:
        text = "".join(piece.text for piece in stream)
    assert text == stream.result().text == whole[: whole.index(stop)]
    assert stream.result().ending == "stop"


def test_logits_processors_from_hugging_face(swift: TokenSwift) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 25, "seed": 4, "top_p": 1.0}
    warmer = swift.generate("x", temperature=1.0, logits_processors=[TemperatureLogitsWarper(2.0)], **settings)
    assert warmer.tokens == swift.generate("x", temperature=2.0, **settings).tokens


def test_leaving_a_stream_early_keeps_what_was_written(swift: TokenSwift) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 60, "seed": 6, "ignore_eos": True, "draft_tokens": 4}
    whole = swift.generate("the cat", **settings)
    with swift.stream("the cat", **settings) as stream:
        for _ in stream:
            if len(stream.tokens) >= 20:
                break
    part = stream.result()
    assert part.ending == part.report["ending"] == "interrupted"
    assert part.tokens == whole.tokens[: len(part.tokens)]
    assert whole.text.startswith(part.text.rstrip("\ufffd"))
    figures = swift.baseline(stream).report
    assert figures["identical"] is True


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 0)


def test_weights_of_drafts_count_before_a_text_is_begun(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are packed for the first text that asks for them, and its pages are taken one by one: neither alone is seen
    not to fit, and the text would end hours later."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="bf16", engine="native")
    parameters = swift.checkpoint.spec.parameters
    assert swift.executor.draft_bytes("auto") == pytest.approx(1.06 * parameters, rel=0.05)
    assert swift.executor.draft_bytes("bf16") == 0
    monkeypatch.setattr("tokenswift_py.memory.HEADROOM", 0)
    for free, refused in ((0, True), (2**40, False)):
        monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda free=free: free)
        if refused:
            with pytest.raises(
                UserError, match=r"memory: .* drafts' weights \(\d+ MiB; none with --draft-weights bf16"
            ):
                swift.generate("the cat", max_new_tokens=4)
        else:
            swift.generate("the cat", max_new_tokens=4)
    assert swift.executor.draft_bytes("auto") == 0, "packed by now"


def test_paths_are_taken_where_names_are(tiny_folder: Path, tmp_path: Path) -> None:
    swift = TokenSwift.from_pretrained(tiny_folder, dtype="fp32", engine="torch")  # type: ignore[arg-type]
    swift.generate("the cat", max_new_tokens=4, trace=tmp_path / "trace.jsonl")
    assert (tmp_path / "trace.jsonl").stat().st_size


def test_a_baseline_is_written_into_the_runs_own_pages(swift: TokenSwift, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two KV caches stand beside one another. They ascend again, or plain decoding would read them slower."""
    for settings in ({}, {"kv_budget": 256}):
        with swift.stream("the cat", max_new_tokens=280, seed=6, ignore_eos=True, **settings) as stream:
            list(stream)
        with monkeypatch.context() as patch:
            for pool in ("kvcache.pages.TorchPagePool", "models.native.NativePool"):
                patch.setattr(f"tokenswift_py.{pool}.__init__", lambda *_: pytest.fail("a second pool"))
            no_memory(patch)
            assert swift.baseline(stream).report["identical"] is True
            spare = stream.spare_cache(256)
            assert spare is not None and spare.pool is stream.loop.cache.pool
            spare.append(np.arange(256, dtype=np.int32), True)
            assert (np.diff(spare.pages) == 1).all()
            spare.release()


def test_a_baseline_beside_a_run_that_goes_on_needs_memory(swift: TokenSwift, monkeypatch: pytest.MonkeyPatch) -> None:
    with swift.stream("the cat", max_new_tokens=60, seed=6, ignore_eos=True, draft_tokens=4) as stream:
        pieces = iter(stream)
        while len(stream.tokens) < 20:
            next(pieces)
        with monkeypatch.context() as patch:
            no_memory(patch)
            with pytest.raises(UserError, match=r"memory: .* a second KV cache of \d+ tokens, for plain decoding,"):
                swift.baseline(stream)
        assert swift.baseline(stream).report["identical"] is True
        list(pieces)
    assert len(stream.tokens) == 60 and swift.baseline(stream).report["identical"] is True


def test_a_baseline_of_a_part_of_a_text_is_refused(swift: TokenSwift, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 60, "seed": 6, "ignore_eos": True, "draft_tokens": 4}
    with swift.stream("the cat", out=tmp_path / "run", **settings) as stream:
        next(pieces := iter(stream))
        next(pieces)
    with swift.resume(tmp_path / "run") as stream:
        list(stream)
    with pytest.raises(UserError, match=r"baseline: 'a run resumed after \d+ tokens' is not allowed"):
        swift.baseline(stream)


def strict(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the report as a reader of JSON has it that knows no NaN."""
    return dict(json.loads(json.dumps(report, allow_nan=False)))


def test_every_report_is_strict_json(swift: TokenSwift) -> None:
    for tokens in (0, 1, 2):
        with swift.stream("the cat", max_new_tokens=max(1, tokens), seed=6, ignore_eos=True) as stream:
            if tokens:
                list(stream)
        compared = swift.baseline(stream).report
        assert strict(stream.result().report)["new_tokens"] == strict(compared)["new_tokens"] == tokens
        assert compared["identical"] is True
        assert f"{tokens} new tokens" in summary(stream.result().report) and summary(compared)


@pytest.mark.parametrize("ms", [0.0, float("nan"), float("inf"), 2.0])
@pytest.mark.parametrize("bandwidth", [1e10, float("nan"), float("inf")])
def test_times_that_no_clock_should_give_are_null(swift: TokenSwift, ms: float, bandwidth: float) -> None:
    whole = swift.generate("the cat", max_new_tokens=2).report
    stats = GenerationStats(num_spec_steps=3, step_tokens=5, first_tokens=1, phase_ms={"verify": ms})
    compared = baseline_figures(stats, stats, [1], [1], 1e6, bandwidth)
    said = strict({**whole, **run_figures(stats), **compared})
    assert said["phase_ms"]["verify"] in (ms, None)
    assert said["speedup"] == (1.0 if ms == 2.0 else None)
    assert "does not loop" in summary(said)


def test_a_trace_that_cannot_be_begun_or_closed_costs_the_trace_alone(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[int] = []

    class Full(io.StringIO):
        def close(self) -> None:
            recorded.append(len(read(tmp_path / "close").tokens))
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def taken(field: str, path: str) -> io.StringIO:
        Path(path).touch()  # by someone else, after the check
        check_new(field, path)
        return io.StringIO()

    settings: dict[str, Any] = {"max_new_tokens": 30, "seed": 1, "ignore_eos": True}
    plain = swift.generate("the cat", **settings)
    for name, new_file, why in (
        ("begin", taken, "'.*' is not allowed; a new file; nothing is overwritten"),
        ("close", lambda *_: Full(), "No space left on device"),
    ):
        monkeypatch.setattr("tokenswift_py.runs.report.new_file", new_file)
        caplog.clear()
        with swift.stream("the cat", trace=str(tmp_path / f"{name}.jsonl"), out=tmp_path / name, **settings) as stream:
            list(stream)
        assert stream.result().tokens == plain.tokens == read(tmp_path / name).tokens
        (told,) = [record.message for record in caplog.records if record.message.startswith("trace: ")]
        assert re.fullmatch(f"trace: {why}: it ends here, the text goes on", told)
    assert set(recorded) == {30}, "the journal is on the disk before the trace is closed"


def test_a_trace_needs_a_folder_that_can_be_written(
    swift: TokenSwift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"trace: .* in a folder that is there"):
        swift.stream("the cat", trace=str(tmp_path / "missing" / "trace"))
    monkeypatch.setattr("tokenswift_py.errors.os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"trace: .* in a folder that lets this user write"):
        swift.stream("the cat", trace=str(tmp_path / "trace"))


def test_the_report_says_everything(swift: TokenSwift) -> None:
    with swift.stream("the cat", max_new_tokens=50, seed=6, ignore_eos=True) as stream:
        list(stream)
    report = swift.baseline(stream).report
    assert report["identical"] is True
    assert report["first_divergence"] is None
    assert report["guarantee"] == {"native": "bitwise", "torch": "measured"}[report["engine"]]
    assert report["speedup"] == pytest.approx(report["ar_ms_per_token"] / report["ms_per_token"], rel=1e-3)
    assert 0 < report["baseline"]["share_of_memory_limit"] < 1.5
    assert report["new_tokens"] == 50 == 1 + report["num_spec_steps"] + report["num_accepted_draft_tokens"]
    assert set(report) >= {
        "schema", "model", "parameters", "seed", "drafter", "engine", "numerics", "prompt_tokens", "phase_ms",
        "mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram", "num_draft_tokens",
        "distinct_1", "distinct_2", "distinct_3", "distinct_4", "looping", "window_perplexity", "peak_memory_bytes",
    }  # fmt: skip


def test_a_loop_is_warned_of_live_and_once_stopped_or_ignored_and_always_reported(
    swift: TokenSwift, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 150, "logit_bias": {5: 1000.0}, "ignore_eos": True, "seed": 1}
    with swift.stream("the cat", **settings) as stream:
        for _ in stream:
            assert ("the text loops" in caplog.text) == (len(stream.tokens) >= 64)
        result = stream.result()
    swift.baseline(stream)
    assert caplog.text.count("from new token 0 on it is one token over and over, 64 tokens so far") == 1
    assert result.report["loops"] == [result.report["loop"]] == [{"start": 0, "stop": 150, "period": 1}]
    caplog.clear()
    assert swift.generate("the cat", on_loop="ignore", **settings).report["loops"] == result.report["loops"]
    with swift.stream("the cat", on_loop="stop", **settings) as stream:
        list(stream)
    assert caplog.text == ""
    stopped = swift.baseline(stream)
    assert stopped.tokens == result.tokens[:64]
    assert stopped.ending == stopped.report["ending"] == "loop" and stopped.report["identical"] is True
    assert stopped.report["loops"] == [{"start": 0, "stop": 64, "period": 1}]
    assert swift.generate("the cat", max_new_tokens=20, seed=1).report["loops"] == []


def test_the_lossy_mode_is_bounded_and_called_lossy(swift: TokenSwift, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(plan, "check_memory", lambda size, *_: needed.append(size))
    settings: dict[str, Any] = {"max_new_tokens": 380, "seed": 6, "ignore_eos": True}
    whole = swift.generate("the cat", **settings)
    with swift.stream("the cat", kv_budget=300, **settings) as stream:
        list(stream)
    result = swift.baseline(stream)
    report = result.report
    assert report["lossy"] is True and report["guarantee"] == "lossy"
    assert report["eviction"] == {
        "policy": "recent", "budget": 256, "period": 64, "evictions": 3, "evicted_tokens": 192, "memory": None,
        "memory_bytes": 0,
    }  # fmt: skip
    assert report["numerics"] == whole.report["numerics"] + "/kv-recent-256-64"
    assert report["identical"] is True and "lossy" in report["baseline"]["what"]
    with swift.stream("the cat", **settings) as stream:
        list(stream)
    lossless = swift.baseline(stream).report
    assert report["baseline"]["bytes_per_token"] < lossless["baseline"]["bytes_per_token"]
    same = 256 - report["prompt_tokens"] + 1
    assert result.tokens[:same] == whole.tokens[:same] and result.tokens != whole.tokens
    tables = rope_bytes(swift.checkpoint.config, report["parameters"]["context"])
    assert needed[1] == cache_bytes(swift, 300) + tables < needed[0]
    assert swift.generate("the cat", kv_budget=300, drafter="partial", **settings).tokens == result.tokens
    again = swift.generate("the cat", **json.loads(json.dumps(report["parameters"])))
    assert (again.tokens, again.report["eviction"]) == (result.tokens, report["eviction"])
    fits = swift.generate("the cat", kv_budget=1000, kv_policy="recent", **settings)
    assert fits.tokens == whole.tokens and fits.report["eviction"]["evictions"] == 0
    assert (whole.report["lossy"], whole.report["eviction"]) == (False, None)


@pytest.fixture(scope="module")
def over_int8(tiny_folder: Path) -> TokenSwift:
    """The native engine with an int8 KV cache."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", kv_dtype="int8", engine="native")


@pytest.mark.parametrize("kv_budget", [None, 256])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_drafter_changes_the_text_over_an_int8_cache(
    over_int8: TokenSwift, temperature: float, kv_budget: int | None
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 350, "seed": 3, "temperature": temperature, "kv_budget": kv_budget, "ignore_eos": True
    }  # fmt: skip
    plain = over_int8.generate("the cat and the dog and the cat", drafter="none", **settings)
    for drafter in ("ngram", "partial", "cascade"):
        drafted = over_int8.generate(
            "the cat and the dog and the cat", drafter=drafter, draft_budget=128, draft_tokens=6, **settings
        )
        assert drafted.tokens == plain.tokens
        assert drafted.report["num_accepted_draft_tokens"] > 0 or drafter == "ngram"  # random weights repeat little
        assert drafted.report["guarantee"] == ("lossy" if kv_budget else "bitwise")


def test_an_int8_cache_is_named_and_counted_with_its_scales(
    swift: TokenSwift, over_int8: TokenSwift, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(plan, "check_memory", lambda size, *_: needed.append(size))
    reports = []
    for model in (swift, over_int8):
        with model.stream("the cat", max_new_tokens=100, seed=2, ignore_eos=True, draft_weights="bf16") as stream:
            list(stream)
        reports.append(model.baseline(stream).report)
    fp32, int8 = reports
    assert (fp32["kv_dtype"], int8["kv_dtype"]) == ("fp32", "int8")
    assert "/fp32/kv-int8-products/" in int8["numerics"] and "/kv-int8" not in fp32["numerics"]
    assert int8["identical"] is True
    spec = over_int8.checkpoint.spec
    a_head, heads = spec.head_dim + 4, 2 * spec.layers * spec.kv_heads  # a byte an element, and the scale
    positions = range(fp32["prompt_tokens"], fp32["prompt_tokens"] + 100)
    for model, report, bytes_of_head in [(swift, fp32, 4 * spec.head_dim), (over_int8, int8, a_head)]:
        expected = model.executor.multiplied_nbytes + heads * bytes_of_head * sum(positions) / 100
        assert report["baseline"]["bytes_per_token"] == pytest.approx(expected, abs=1)
    tokens = fp32["prompt_tokens"] + 100
    tables = rope_bytes(swift.checkpoint.config, tokens)
    assert {size - tables for size in needed} == {cache_bytes(swift, tokens), cache_bytes(over_int8, tokens)}


def test_the_memory_check_counts_a_pages_bounds(swift: TokenSwift) -> None:
    count = pages_for(100)
    pool = swift.executor.model(rope_tables(swift.checkpoint.config, 64)).new_pool(count)
    bounds = pool.key_bounds(np.array([pool.allocate() for _ in range(count)], np.int32))
    of_keys = plan.kept_of_keys(swift.checkpoint.spec.head_dim, "quest")
    assert swift.kv_bytes(100, of_keys) == count * pool.page_bytes + sum(part.nbytes for part in bounds)


def test_log_extend_is_picked_beyond_the_trained_length(swift: TokenSwift, caplog: pytest.LogCaptureFixture) -> None:
    result = swift.generate("the cat", max_new_tokens=4, context=2500, seed=1)
    assert "beyond the 1024 trained positions: log-extend, beyond a window of 256 in blocks of 128" in caplog.text
    assert "/rope-default+log-extend-w256-b128-s" in result.report["numerics"]
    told = {name: result.report["parameters"][name] for name in ("positions", "positions_window", "positions_block")}
    assert told == {"positions": "log-extend", "positions_window": 256, "positions_block": 128}
    again = swift.generate("the cat", max_new_tokens=4, context=2500, seed=1, **told)
    assert again.report["numerics"] == result.report["numerics"] and again.tokens == result.tokens


def test_yarn_is_picked_by_the_user_alone_and_told_what_it_costs(
    swift: TokenSwift, caplog: pytest.LogCaptureFixture
) -> None:
    result = swift.generate("the cat", max_new_tokens=4, context=2500, positions="yarn")
    assert "YaRN with factor 3, which the weights were not trained for" in caplog.text
    assert "/rope-yarnx3" in result.report["numerics"]
    within = swift.generate("the cat", max_new_tokens=4, positions="yarn").report
    assert within["parameters"]["positions"] == "trained" and within["numerics"].endswith("/rope-default")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens: 9"),
        ({"context": 20, "max_new_tokens": 100}, "context: 20 .* need 1"),
        ({"drafter": "oracle"}, "drafter: 'oracle' .* ngram"),
        ({"on_loop": "dance"}, "on_loop: 'dance' .* warn, stop, ignore"),
        ({"kv_budget": 255}, "kv_budget: 255 .* at least 256"),
        ({"kv_budget": 1e4}, "kv_budget: 10000.0 .* whole number"),
        ({"kv_budget": 512, "kv_policy": "best"}, "kv_policy: 'best' .* recent"),
        ({"kv_policy": "recent"}, "kv_policy: 'recent' .* only with kv_budget"),
        ({"draft_policy": "best"}, "draft_policy: 'best' .* recent"),
        ({"draft_budget": 1}, "draft_budget: 1"),
        ({"temperature": -1}, "temperature: -1"),
        ({"top_p": 0}, "top_p: 0"),
        ({"penalty": 0.5}, "penalty: 0.5"),
        ({"seed": -1}, "seed: -1"),
        ({"stop": "text"}, "stop: 'text'"),
        ({"stop": [""]}, "stop"),
        ({"ban": [10**6]}, "ban: 1000000"),
        ({"ban": ["the cat and the dog"]}, "ban"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: -1"),
        ({"chapters": ["x"], "ignore_eos": True}, "chapters"),
        ({"temprature": 1}, "temprature: no such parameter"),
        ({"max_new_tokens": 10**12}, "memory"),
    ],
)
def test_wrong_parameters_are_told_in_one_line(swift: TokenSwift, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        swift.generate("the cat", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["", [], [5, 10**6], [-1]])
def test_prompts_that_cannot_be(swift: TokenSwift, prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt"):
        swift.generate(prompt, max_new_tokens=3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "fp8"}, "dtype: 'fp8'"),
        ({"attention": "magic"}, "attention: 'magic'"),
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"device": "meta"}, "device: 'meta'"),
        ({"threads": 0}, "threads: 0"),
        ({"engine": "steam"}, "engine: 'steam'"),
        ({"engine": "native", "attention": "sdpa"}, "attention: 'sdpa'"),
        ({"engine": "torch", "kv_dtype": "fp32"}, "kv_dtype: 'fp32'"),
        (
            {"engine": "torch", "kv_dtype": "int8"},
            "kv_dtype: 'int8' .* engine torch and attention sdpa only .* triton and engine native have int8",
        ),
        ({"kv_dtype": "int3"}, "kv_dtype: 'int3' .* bf16, fp32, int8"),
    ],
)
def test_wrong_ways_to_load(tiny_folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TokenSwift.from_pretrained(str(tiny_folder), **settings)


def test_without_the_extension_auto_is_torch_and_says_so(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executors, "EXTENSION", "tokenswift_py.kernels.cpu._missing")
    swift = TokenSwift.from_pretrained(str(tiny_folder))
    assert swift.executor.name == "torch"
    assert caplog.text.count("the C++ engine is not built") == 1
    with pytest.raises(UserError, match=r"engine: 'native' .* C\+\+ compiler"):
        TokenSwift.from_pretrained(str(tiny_folder), engine="native")


def test_both_engines_write_the_same_fp32_text(tiny_folder: Path) -> None:
    """Not a law, but their arithmetic differs by rounding only, and the noise is one."""
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    texts = [
        TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=engine)
        .generate("the cat", max_new_tokens=100, seed=8, ignore_eos=True, penalty=1.1, dry_multiplier=0.5)
        .tokens
        for engine in ("native", "torch")
    ]
    assert texts[0] == texts[1]


def test_the_reports_parameters_write_the_text_again(swift: TokenSwift) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 30, "dry_multiplier": 0.8, "logit_bias": {5: -1.0}, "stop": ["zzz"]}
    first = swift.generate("the cat", **settings)
    recorded = json.loads(json.dumps(first.report["parameters"]))
    again = swift.generate("the cat", **recorded)
    assert again.tokens == first.tokens
    assert again.report["parameters"] == first.report["parameters"]
    assert again.report["prompt_sha256"] == first.report["prompt_sha256"]


def test_a_result_is_a_snapshot(swift: TokenSwift) -> None:
    with swift.stream("the cat", max_new_tokens=40, seed=1, ignore_eos=True, logprobs=True) as stream:
        pieces = iter(stream)
        next(pieces)
        early = stream.result()
        list(pieces)
    assert len(early.tokens) == early.stats.new_tokens == len(early.logprobs or []) == 1
    assert len(stream.result().tokens) == 40


def test_a_run_left_between_chapters_was_interrupted(swift: TokenSwift) -> None:
    with swift.stream("a", max_new_tokens=200, seed=2, chapters=["and then"], logit_bias={2: 6.0}) as stream:
        for _ in stream:
            if stream.tokens[-1] in (0, 2):
                break
    assert stream.result().ending == "interrupted"
    assert swift.baseline(stream).report["identical"] is True


def test_a_stop_string_across_a_special_token_ends_run_and_text_alike(swift: TokenSwift) -> None:
    ids = swift.tokenizer("END", add_special_tokens=False).input_ids
    script = [*ids[:1], 1, *ids[1:], 40, 41, 42]

    class Script(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -100.0)
            forced[0, script[(input_ids.shape[1] - start) % len(script)]] = 0
            return forced

    start = len(swift.tokenizer("x").input_ids)
    result = swift.generate("x", raw=True, max_new_tokens=20, temperature=0, stop=["END"], ignore_eos=True,
                            logits_processors=[Script()])  # fmt: skip
    assert result.ending == "stop"
    assert result.text == ""
    assert result.tokens == script[: len(ids) + 1]


@pytest.mark.parametrize(
    "settings",
    [{"ban": 5}, {"ban": [1.5]}, {"stop": 5}, {"logit_bias": 3}, {"chapters": "x"}, {"temperature": 10**400},
     {"top_k": True}],
)  # fmt: skip
def test_wrong_types_are_told_in_one_line(swift: TokenSwift, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        swift.generate("the cat", **settings)


@pytest.mark.parametrize("prompt", [None, 5, [{"role": "user"}], [5, "x"]])
def test_prompts_of_the_wrong_kind(swift: TokenSwift, prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt"):
        swift.generate(prompt, max_new_tokens=3)


def test_layers_with_a_window_read_no_more_than_it(tmp_path: Path) -> None:
    """The bytes of plain decoding, and with them the share of the memory limit."""
    save_tiny(tmp_path, "qwen2", use_sliding_window=True, sliding_window=70, max_window_layers=1)
    swift = TokenSwift.from_pretrained(str(tmp_path), dtype="fp32", engine="torch")
    spec = swift.checkpoint.spec
    local, of_key = spec.windows.count(70), 2 * spec.kv_heads * spec.head_dim * 4
    assert 0 < local < spec.layers
    before, at_the_edge, after = (swift.step_bytes(n) - swift.step_bytes(0) for n in (50, 70, 1000))
    assert (before, at_the_edge) == (50 * spec.layers * of_key, 70 * spec.layers * of_key)
    assert after == (70 * local + 1000 * (spec.layers - local)) * of_key
