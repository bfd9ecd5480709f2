"""Log-probabilities, several samples, and what stopped a text: as asked for, whatever drafts or interrupts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from tokenswift_py import Result, TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.runs.audit import audit
from tokenswift_py.runs.folder import save_logprobs
from tokenswift_py.runs.journal import read

PROMPT = [int(token) for token in torch.randint(3, 280, (150,), generator=torch.manual_seed(1))]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_new_tokens": 40, "ignore_eos": True, "on_loop": "ignore"}
EVERYTHING: dict[str, Any] = {
    **SAMPLED, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "penalty": 1.05,
    "dry_multiplier": 0.5, "no_repeat_ngram_size": 3, "ban_words": [[9, 40], "the cat"], "top_n_sigma": 3.0,
    "top_k": 100, "top_p": 0.98, "min_p": 0.001, "typical_p": 0.95, "xtc_threshold": 0.02, "xtc_probability": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")


@pytest.fixture(scope="module")
def told(swift: TokenSwift) -> Result:
    return swift.generate(PROMPT, logprobs=3, prompt_logprobs=2, **SAMPLED)


def test_they_are_those_of_transformers(swift: TokenSwift, told: Result, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    text = PROMPT + told.tokens
    with torch.no_grad():
        wanted = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    assert told.prompt_logprobs is not None and told.prompt_logprobs[0] is None and told.top_logprobs is not None
    assert told.logprobs is not None and len(told.prompt_logprobs) == len(PROMPT) and len(told.logprobs) == 40
    found = [*told.prompt_logprobs[1:], *zip(told.logprobs, told.top_logprobs, strict=True)]
    for row, (position, entry) in zip(wanted, enumerate(found, start=1), strict=False):
        assert entry is not None
        logprob, likely = entry
        best = row.topk(2 if position < len(PROMPT) else 3)
        assert logprob == pytest.approx(float(row[text[position]]), abs=1e-4)
        assert [value for _, value in likely] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [token for token, _ in likely] == best.indices.tolist()


def test_drafts_change_none_of_them_and_asking_changes_no_token(swift: TokenSwift, told: Result) -> None:
    for drafter in ("none", "partial"):
        other = swift.generate(PROMPT, logprobs=3, prompt_logprobs=2, drafter=drafter, **SAMPLED)
        assert (other.logprobs, other.top_logprobs, other.prompt_logprobs) == (
            told.logprobs, told.top_logprobs, told.prompt_logprobs,
        )  # fmt: skip
    plain = swift.generate(PROMPT, **SAMPLED)
    assert plain.tokens == told.tokens and plain.logprobs is plain.top_logprobs is plain.prompt_logprobs is None
    alone = swift.generate(PROMPT, logprobs=True, **SAMPLED)
    assert alone.logprobs == told.logprobs and alone.top_logprobs is None


def test_a_resumed_run_knows_those_of_all_of_its_text(swift: TokenSwift, told: Result, tmp_path: Path) -> None:
    with swift.stream(PROMPT, out=tmp_path, kv_snapshot=True, logprobs=3, prompt_logprobs=2, **SAMPLED) as stream:
        for _ in stream:
            if len(stream.tokens) > 15:
                break
    with swift.resume(tmp_path) as stream:
        list(stream)
    result = stream.result()
    assert result.logprobs == told.logprobs and result.top_logprobs == told.top_logprobs
    assert result.prompt_logprobs == told.prompt_logprobs
    save_logprobs(tmp_path, PROMPT, result)
    lines = [json.loads(line) for line in (tmp_path / "logprobs.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == list(range(1, len(PROMPT) + 40))
    assert [line["token"] for line in lines] == (PROMPT + result.tokens)[1:]
    assert [line["logprob"] for line in lines[len(PROMPT) - 1 :]] == told.logprobs


def test_with_everything_on_drafting_resuming_and_audits_find_the_same_text(swift: TokenSwift, tmp_path: Path) -> None:
    plain = swift.generate(PROMPT, drafter="none", **EVERYTHING)
    drafted = [swift.generate(PROMPT, **EVERYTHING, **s) for s in ({}, {"drafter": "partial", "draft_tokens": 4})]
    assert [result.tokens for result in drafted] == [plain.tokens] * 2 and len(plain.tokens) == 40
    with swift.stream(PROMPT, out=tmp_path / "run", **EVERYTHING) as stream:
        for _ in stream:
            if len(stream.tokens) > 15:
                break
    with swift.resume(tmp_path / "run") as stream:
        list(stream)
    assert stream.result().tokens == plain.tokens
    found = audit(swift, tmp_path / "run", sample=1)
    assert found.passed and found.proof and found.checked == 40
    with pytest.raises(UserError, match=r"^presence_penalty: 0.3 is not allowed; the run was written with 0.2"):
        swift.resume(tmp_path / "run", presence_penalty=0.3)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:9]], ids=["shared", "too short to share"])
def test_samples_are_what_each_is_alone(swift: TokenSwift, prompt: list[int]) -> None:
    samples = swift.generate_n(prompt, 3, **SAMPLED)
    alone = [swift.generate(prompt, stream=number, **SAMPLED) for number in range(3)]
    assert [s.tokens for s in samples] == [s.tokens for s in alone]
    assert len({tuple(s.tokens) for s in samples}) == 3
    rows = [s.stats.prefill_tokens for s in samples]
    assert rows == ([32] * 3 if prompt is PROMPT else [9] * 3)
    assert [s.report["parameters"]["stream"] for s in samples] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^n: 0 is not allowed"):
        swift.generate_n(prompt, 0)
    with pytest.raises(UserError, match=r"^trace: 't' is not allowed; not with n"):
        swift.generate_n(prompt, 2, trace="t")
    with pytest.raises(UserError, match=r"^logits_processors: \['Counting'\] is not allowed; pure ones"):
        swift.generate_n(prompt, 2, logits_processors=[Counting()])


class Counting(LogitsProcessor):
    """Keeps state, which a second text must not begin with."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


def test_the_command_line_writes_samples_beside_one_another(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_folder), "--dtype", "fp32", "--prompt", "the cat", "--max-new-tokens", "6", "--quiet",
             "--n", "2", "--temperature", "1", "--seed", "4", "--logprobs", "1"]  # fmt: skip
    flags += ["--out", str(tmp_path / "run")]
    assert main(flags) == 0
    told = capsys.readouterr().out
    for number in (1, 2):
        folder = tmp_path / "run" / str(number)
        assert f"--- sample {number} of 2 ---\n{(folder / 'text.txt').read_text()}" in told
        lines = (folder / "logprobs.jsonl").read_text().splitlines()
        assert [json.loads(line)["token"] for line in lines] == read(folder).tokens
        assert len(json.loads(lines[0])["top"]) == 1
    assert read(tmp_path / "run" / "1").tokens != read(tmp_path / "run" / "2").tokens
    for wrong in (
        ["--n", "0"],
        ["--n", "1025"],
        ["--logprobs", "1"],
        ["--n", "2", "--baseline"],
        ["--n", "2", "--trace", "t"],
    ):
        assert main(["--model", str(tiny_folder), "--prompt", "x", *wrong]) == 2


def test_what_stopped_a_text_stays_where_it_is_asked_for(swift: TokenSwift) -> None:
    text = swift.generate(PROMPT, **SAMPLED).text
    stop = text[8:11]
    cut, kept = (swift.generate(PROMPT, **SAMPLED, stop=[stop], keep_stop=keep) for keep in (False, True))
    assert cut.tokens == kept.tokens and cut.ending == kept.ending == "stop"
    assert cut.text == text[: text.index(stop)] and kept.text == cut.text + stop
    token = swift.generate(PROMPT, **SAMPLED).tokens[10]
    cut, kept = (swift.generate(PROMPT, **SAMPLED, stop_tokens=[token], keep_stop=keep) for keep in (False, True))
    assert cut.tokens == kept.tokens and kept.text.startswith(cut.text) and len(kept.text) > len(cut.text)
