"""An audit finds every way in which a record is not what plain decoding writes, at its place, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.head_files import write_heads
from tokenswift_py.drafters.head_weights import HeadWeights
from tokenswift_py.runs import audit, journal
from tokenswift_py.runs.journal import Journal
from tokenswift_py.runs.report import first_divergence
from tokenswift_py.sampling.reference import Sampler

Change = Callable[[dict[str, Any], list[int], list[bool]], None]

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 90, "seed": 2, "chapters": ["and then", "the rain"], "logit_bias": {2: 5.0}, "penalty": 1.1,
    "dry_multiplier": 0.4, "min_new_tokens": 20, "ban": [70], "context": 600, "draft_tokens": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="native")


@pytest.fixture(scope="module")
def torch_swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="torch")


def record(swift: TokenSwift, folder: Path, **settings: Any) -> Any:
    with swift.stream("the cat", out=folder, **settings) as stream:
        list(stream)
    return stream.result()


@pytest.fixture(scope="module")
def honest(swift: TokenSwift, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A recorded run of several chapters, and its result."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    result = record(swift, folder, **SETTINGS)
    assert len(result.forced) >= 1
    return folder, result


def forged(folder: Path, target: Path, change: Change) -> Path:
    """Writes the same record with something changed, and with right checksums."""
    found = journal.read(folder)
    tokens, forced, header = list(found.tokens), list(found.forced), json.loads(json.dumps(found.header))
    change(header, tokens, forced)
    again = Journal.create(target, header)
    again._pending = list(zip(tokens, forced, strict=True))
    again.close()
    return target


@pytest.mark.parametrize("drafter", ["none", "ngram", "partial", "cascade"])
def test_an_honest_run_is_proven(swift: TokenSwift, tmp_path: Path, drafter: str) -> None:
    result = record(swift, tmp_path, **SETTINGS, drafter=drafter)
    found = audit.audit(swift, tmp_path, sample=2)
    assert found.passed and found.proof
    assert found.checked == result.report["new_tokens"] and found.forced == result.report["forced_tokens"]
    assert found.ending == result.ending
    assert found.decoded >= 2 * audit.WINDOW - found.forced - audit.WINDOW and found.unequal_rows == 0
    assert found.ar_seconds is not None and found.ar_seconds > 0
    assert "PROVEN" in audit.verdict(found, str)


def test_what_drafted_need_not_be_there_any_more(swift: TokenSwift, tmp_path: Path) -> None:
    size, file = swift.checkpoint.spec.hidden_size, tmp_path / "heads.safetensors"
    tensors = {"weight": torch.zeros(1, 1, size, size), "bias": torch.zeros(1, 1, size)}
    write_heads(HeadWeights("medusa", tensors), file)
    record(swift, tmp_path / "run", **SETTINGS, drafter="cascade", draft_heads=str(file))
    file.unlink()
    found = audit.audit(swift, tmp_path / "run")
    assert found.passed and found.proof


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_chapters_of_a_least_length_are_proven(swift: TokenSwift, tmp_path: Path, drafter: str) -> None:
    """Whether a text may end yet depends on the chapter that a position lies in. Every chapter is checked again."""
    settings = {**SETTINGS, "min_new_tokens": 0, "min_chapter_tokens": 20, "logit_bias": {2: 9.0}, "drafter": drafter}
    result = record(swift, tmp_path, **settings)
    begins = [0, *(stop for _, stop in result.forced)]
    ends = [start for start, _ in result.forced]
    assert len(ends) == 2 and all(end - begin >= 21 for begin, end in zip(begins, ends, strict=False))
    found = audit.audit(swift, tmp_path, sample=2)
    assert found.passed and found.proof


def test_chunks_do_not_matter(swift: TokenSwift, honest: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOGITS_BYTES", 5 * 4 * swift.checkpoint.spec.vocab_size)
    rows = []
    found = audit.audit(swift, honest[0], progress=rows.append)
    assert found.passed and max(rows) <= 5
    assert found.checked == honest[1].report["new_tokens"]


def test_a_flipped_token_is_found_at_its_position(swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path) -> None:
    folder, result = honest
    inside = {i for start, stop in result.forced for i in range(start, stop)}
    for index in [0, 1, 17, len(result.tokens) - 1, *range(30, len(result.tokens), 7)]:
        other = (result.tokens[index] + 1) % 300

        def flip(header: Any, tokens: list[int], forced: Any, index: int = index, other: int = other) -> None:
            tokens[index] = other

        found = audit.audit(swift, forged(folder, tmp_path / str(index), flip))
        assert not found.passed
        if index in inside:
            assert found.faults == [f"token {index}: the turn forced there has {result.tokens[index]}"]
            assert found.mismatch is None
        else:
            assert found.mismatch is not None and found.mismatch.margin > 0
            assert (found.mismatch.index, found.mismatch.recorded) == (index, other)
            assert found.mismatch.chosen == result.tokens[index]
            assert f"MISMATCH at token {index}:" in audit.verdict(found, str)


def test_an_end_that_was_made_up_is_found_where_it_stands(
    swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path
) -> None:
    """The report names the token that became an EOS, or the EOS that became another token, not what follows from it."""
    folder, result = honest
    end = result.forced[0][0] - 1
    for name, index, token in (("ends", 10, 2), ("goes on", end, 68)):

        def change(header: Any, tokens: list[int], forced: Any, index: int = index, token: int = token) -> None:
            tokens[index] = token

        found = audit.audit(swift, forged(folder, tmp_path / name, change))
        assert found.mismatch is not None and found.mismatch.index == index
        assert bool(found.faults)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 3}, {"stream": 1}, {"temperature": 0.9}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.2},
        {"penalty": 1.5}, {"dry_multiplier": 3.0}, {"logit_bias": {"2": 8.0, "68": 8.0}}, {"ban": []},
        {"min_new_tokens": 0}, {"temperature": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_parameter_is_found_where_it_changes_the_text(
    swift: TokenSwift, tmp_path: Path, changed: dict[str, Any]
) -> None:
    settings = {**SETTINGS, "logit_bias": {2: 8.0, 68: 9.0, 69: 9.0, 70: 9.0}, "dry_length": 1, "dry_breakers": []}
    result = record(swift, tmp_path / "run", **settings)
    other = swift.generate("the cat", **{**settings, **changed})
    place = first_divergence(result.tokens, other.tokens)

    def change(header: dict[str, Any], tokens: Any, forced: Any) -> None:
        header["parameters"] |= changed

    assert place is not None, "the parameter changes this text"
    found = audit.audit(swift, forged(tmp_path / "run", tmp_path / "forged", change))
    assert found.mismatch is not None and found.mismatch.index == place
    assert found.mismatch.chosen == other.tokens[place]


def test_forced_marks_are_derived_again(swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path) -> None:
    folder, result = honest
    start = result.forced[0][0]

    def hide(header: Any, tokens: Any, forced: list[bool]) -> None:
        forced[start] = False

    def invent(header: Any, tokens: Any, forced: list[bool]) -> None:
        forced[3] = True

    def more(header: Any, tokens: list[int], forced: list[bool]) -> None:
        tokens += [68]
        forced += [False]

    for name, change, says in (
        ("hide", hide, f"token {start}: it is forced by the chapter rule"),
        ("invent", invent, "token 3: it is not forced by the chapter rule"),
        ("more", more, f"token {len(result.tokens)}: after the end of the text ({result.ending})"),
    ):
        found = audit.audit(swift, forged(folder, tmp_path / name, change))
        assert (found.passed, found.faults, found.mismatch) == (False, [says], None)
        assert f"FAULT: {says}" in audit.verdict(found, str)


def test_files_beside_the_journal_must_say_the_same(swift: TokenSwift, tmp_path: Path, honest: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(honest[0], folder)
    text, tokens = honest[1].text, np.array(honest[1].tokens, np.int32)

    def faults(tokens: np.ndarray, text: str) -> list[str]:
        np.save(folder / "tokens.npy", tokens)
        (folder / "text.txt").write_bytes(text.encode())
        return audit.audit(swift, folder).faults

    assert faults(tokens, text) == []
    assert faults(tokens, text + "!") == ["text.txt is not the text of the recorded tokens"]
    flipped = tokens.copy()
    flipped[7] += 1
    assert faults(flipped, text) == ["tokens.npy differs from the journal at token 7"]
    assert faults(tokens[:-1], text) == [f"tokens.npy has {len(tokens) - 1} tokens, the journal {len(tokens)}"]
    assert faults(flipped, text + "!") == [
        "tokens.npy differs from the journal at token 7", "text.txt is not the text of the recorded tokens"
    ]  # fmt: skip
    (folder / "tokens.npy").unlink()
    assert audit.audit(swift, folder).faults == ["text.txt is not the text of the recorded tokens"]
    (folder / "text.txt").unlink()
    assert audit.audit(swift, folder).passed, "what was deleted says nothing wrong"


def test_a_run_that_was_killed_is_audited_as_far_as_it_got(swift: TokenSwift, honest: Any, tmp_path: Path) -> None:
    def stop(header: Any, tokens: list[int], forced: list[bool]) -> None:
        del tokens[20:], forced[20:]

    def nothing(header: Any, tokens: list[int], forced: list[bool]) -> None:
        tokens.clear(), forced.clear()

    for name, change, count in (("stopped", stop, 20), ("nothing", nothing, 0)):
        found = audit.audit(swift, forged(honest[0], tmp_path / name, change))
        assert (found.passed, found.checked, found.ending) == (True, count, "interrupted")


def test_what_an_interrupted_run_has_beyond_its_journal_is_not_proven(
    swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path
) -> None:
    tokens = np.array(honest[1].tokens, np.int32)
    folder, again = tmp_path / "run", "; `tokenswift resume` writes it again"
    with swift.stream("the cat", out=folder, **SETTINGS) as stream:
        while len(stream.tokens) < 20:
            next(iter(stream))
    count, text = len(stream.tokens), stream.result().text
    (folder / "text.txt").write_bytes(text.encode())
    np.save(folder / "tokens.npy", tokens[:count])
    assert audit.audit(swift, folder).passed
    for more in (tokens[: count + 3], np.append(tokens[:count], 7).astype(np.int32), tokens[: count - 1]):
        np.save(folder / "tokens.npy", more)
        assert audit.audit(swift, folder).faults == [f"tokens.npy has {len(more)} tokens, the journal {count}{again}"]
    (folder / "tokens.npy").unlink()
    (folder / "text.txt").write_bytes((text + " and then").encode())
    found = audit.audit(swift, folder)
    assert found.faults == [f"text.txt is not the text of the recorded tokens{again}"]
    assert found.checked == count and audit.verdict(found, str).endswith(
        "FAILED: not all of this is what plain decoding writes with these parameters"
    )


def test_a_lossy_run_is_proven_with_its_evictions(swift: TokenSwift, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 400, "seed": 5, "ignore_eos": True, "kv_budget": 256, "kv_policy": "mass"}
    result = record(swift, tmp_path / "run", **settings)
    assert result.report["eviction"]["evictions"] >= 2
    found = audit.audit(swift, tmp_path / "run", sample=1)
    assert found.passed and found.proof and "(lossy)" in audit.verdict(found, str)

    def other_policy(header: dict[str, Any], tokens: Any, forced: Any) -> None:
        header["parameters"]["kv_budget"] = 320

    found = audit.audit(swift, forged(tmp_path / "run", tmp_path / "forged", other_policy))
    assert not found.proof and not found.passed


def test_another_engine_cross_checks(
    swift: TokenSwift, torch_swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path
) -> None:
    found = audit.audit(torch_swift, honest[0], sample=1)
    assert found.passed and not found.proof and found.checked == honest[1].report["new_tokens"]
    told = audit.verdict(found, str)
    assert "cross-check: numerics torch" in told and "recorded under native" in told and "proves nothing" in told

    def reseed(header: dict[str, Any], tokens: Any, forced: Any) -> None:
        header["parameters"]["seed"] = 3

    found = audit.audit(torch_swift, forged(honest[0], tmp_path / "seed", reseed))
    assert found.mismatch is not None and found.mismatch.slack > found.rounding
    record(torch_swift, tmp_path / "torch", **SETTINGS)
    found = audit.audit(torch_swift, tmp_path / "torch")
    assert found.passed and not found.proof and found.guarantee == "measured"


def test_what_rounding_explains_is_a_tie(
    torch_swift: TokenSwift, honest: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits a little off change some choices; each is reported with its margin, and none of them fails the audit."""
    rows, noise = audit.Check.rows, torch.Generator().manual_seed(0)

    def rough(self: Any, count: int) -> torch.Tensor:
        logits = rows(self, count)
        return logits + 0.3 * (2 * torch.rand(logits.shape, generator=noise) - 1)

    monkeypatch.setattr(audit.Check, "rows", rough)
    assert audit.audit(torch_swift, honest[0]).mismatch is not None
    monkeypatch.setitem(audit.ROUNDING, "fp32", 2.0)
    found = audit.audit(torch_swift, honest[0])
    assert found.passed and 0 < len(found.ties) < found.checked
    assert all(0 < tie.slack <= found.rounding for tie in found.ties)
    assert f"{len(found.ties)} choices differ within rounding" in audit.verdict(found, str)


def test_rows_that_depend_on_their_company_prove_nothing(
    swift: TokenSwift, honest: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = audit.Check.rows

    def lawless(self: Any, count: int) -> torch.Tensor:
        logits = rows(self, count)
        return logits if count > 1 else logits + 1e-5

    monkeypatch.setattr(audit.Check, "rows", lawless)
    found = audit.audit(swift, honest[0])
    assert found.mismatch is None and found.unequal_rows == found.decoded > 0 and not found.passed


def test_another_model_is_no_audit(swift: TokenSwift, honest: tuple[Path, Any], tmp_path: Path) -> None:
    def change(header: dict[str, Any], tokens: Any, forced: Any) -> None:
        header["model"]["config"] = "0"

    with pytest.raises(UserError, match="model: config"):
        audit.audit(swift, forged(honest[0], tmp_path / "other", change))


def test_the_command_line(
    tiny_folder: Path, honest: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(honest[0]), "--sample", "1", "--json", str(tmp_path / "found.json")]) == 0
    assert "PROVEN: every token is the one that plain decoding writes there" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is True and found["checked"] == honest[1].report["new_tokens"]
    assert main(["audit", str(honest[0]), "--engine", "torch", "--quiet"]) == 0
    assert capsys.readouterr().out == ""

    def reseed(header: dict[str, Any], tokens: Any, forced: Any) -> None:
        header["parameters"]["seed"] = 3

    assert main(["audit", str(forged(honest[0], tmp_path / "seed", reseed))]) == 1
    assert "MISMATCH at token" in (told := capsys.readouterr().out) and "FAILED" in told
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("tokenswift: journal: ")


def test_a_file_for_the_findings_that_cannot_be_is_refused_before_any_work(
    honest: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenswift_py.runs.audit.audit", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "found.json", tmp_path / "file" / "found.json", tmp_path / "file"):
        assert main(["audit", str(honest[0]), "--json", str(path)]) == 2
        assert capsys.readouterr().err.startswith("tokenswift: json: ")


def test_an_audit_that_breaks_off_says_nothing_of_the_text(
    honest: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: audit.Check) -> None:
        raise RuntimeError("logits are not\nfinite")

    monkeypatch.setattr(audit.Check, "run", fails)
    assert main(["audit", str(honest[0])]) == 2
    assert capsys.readouterr().err.endswith(
        "audit: it broke off and says nothing (RuntimeError: logits are not finite)\n"
    )


def test_a_banned_token_is_told_in_json_that_all_can_read(
    honest: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def banned(header: dict[str, Any], tokens: list[int], forced: Any) -> None:
        tokens[3] = 70

    def no_constant(name: str) -> None:
        pytest.fail(name)

    assert main(["audit", str(forged(honest[0], tmp_path / "bad", banned)), "--json", str(tmp_path / "bad.json")]) == 1
    found = json.loads((tmp_path / "bad.json").read_text(), parse_constant=no_constant)
    assert found["mismatch"]["index"] == 3 and found["mismatch"]["margin"] is None
    assert "margin of inf" in capsys.readouterr().out


# The distance of a token from being the choice


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_greedy_margin_and_slack_are_the_distance_of_logits() -> None:
    sampler = Sampler(SamplingParams(ban=(3,)), 4)
    row, history = scores(1.0, 4.0, 2.5, 9.0), History([0])
    assert sampler.behind(row, history, 1) == (0, 0)
    assert sampler.behind(row, history, 2) == (1.5, 1.5)
    assert sampler.behind(row, history, 3) == (np.inf, np.inf)


@pytest.mark.parametrize("seed", range(6))
def test_slack_is_what_makes_a_token_the_choice(seed: int) -> None:
    row, history = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), History([1, 2])
    sampler = Sampler(SamplingParams(temperature=0.5, seed=seed), 40)
    choice = sampler.choose(row, history)
    assert sampler.behind(row, history, choice) == (0, 0)
    for token in range(0, 40, 3):
        margin, slack = sampler.behind(row, history, token)
        assert margin == slack
        for more, expected in ((1e-6, token), (-1e-6, choice)):
            lifted = row.clone()
            lifted[token] += 0.5 * (slack + more)
            assert token == choice or sampler.choose(lifted, history) == expected


def test_a_token_below_the_floor_is_as_far_from_it() -> None:
    """min-p 0.5 keeps tokens within log 2 of the best. The noise of an excluded token may well be the largest."""
    row, history = scores(5.0, 5.0 - np.log(2) - 0.01, -20.0), History([1])
    for seed in range(20):
        sampler = Sampler(SamplingParams(temperature=1.0, min_p=0.5, seed=seed), 3)
        assert sampler.choose(row, history) == 0
        margin, slack = sampler.behind(row, history, 1)
        assert slack == pytest.approx(max(0.01, min(margin, np.log(2))))
