"""How a text reads: window by window, by the model that wrote it or another, against transformers' own loss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenswift_py import TokenSwift, UserError, quality
from tokenswift_py.cli.main import main
from tokenswift_py.extending.human import continuation
from tokenswift_py.quality import Reading, WindowPerplexity, start_tokens, window_quality
from tokenswift_py.runs import journal
from toys import save_tiny

DATA = Path(__file__).resolve().parent / "data"
TEXT = [int(token) for token in np.random.default_rng(5).integers(3, 289, 330)]


@pytest.fixture(scope="module", params=["native", "torch"])
def swift(request: pytest.FixtureRequest, tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine=request.param, threads=1)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def with_bos(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with a tokenizer that begins every text with token 0."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("bos") / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def loss(reference: Any, tokens: Sequence[int]) -> float:
    """transformers' mean -ln p of tokens 2..n."""
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        return float(reference(input_ids=ids, labels=ids).loss)


def test_each_window_is_read_on_its_own_as_transformers_reads_it(swift: TokenSwift, reference: Any) -> None:
    found = swift.window_perplexity(TEXT, window=100)
    parts = [TEXT[:100], TEXT[100:200], TEXT[200:300]]  # the rest, shorter than a window, is left out
    assert [reading.tokens for reading in found.readings] == [99, 99, 99], "the first has nothing before it"
    tokenizer = AutoTokenizer.from_pretrained(swift.checkpoint.folder)
    for reading, part in zip(found.readings, parts, strict=True):
        assert reading.perplexity == pytest.approx(math.exp(loss(reference, part)), rel=1e-4)
        size = len(tokenizer.decode(part[1:]).encode())
        assert reading.bits_per_byte == pytest.approx(loss(reference, part) * 99 / math.log(2) / size, rel=1e-4)
    assert swift.window_perplexity(parts[1]).readings == found.readings[1:2], "a shorter text is one window"


def test_chunks_of_a_pass_change_nothing(swift: TokenSwift, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = swift.window_perplexity(TEXT).readings[0].nats
    monkeypatch.setattr(quality, "CHUNK", 7)
    close = 1e-12 if swift.executor.name == "native" else 1e-5  # a row is a row, and on torch almost
    assert swift.window_perplexity(TEXT).readings[0].nats == pytest.approx(whole, rel=close)


def test_where_the_tokenizer_begins_texts_all_tokens_of_a_window_count(with_bos: Path, reference: Any) -> None:
    swift = TokenSwift.from_pretrained(str(with_bos), dtype="fp32", threads=1)
    (reading,) = swift.window_perplexity(TEXT[:50]).readings
    assert start_tokens(swift.tokenizer) == [0] and reading.tokens == 50
    assert reading.nats == pytest.approx(50 * loss(reference, [0, *TEXT[:50]]), rel=1e-4)


def test_markup_is_no_text_and_a_tiny_text_has_no_window(swift: TokenSwift) -> None:
    marked = [TEXT[0], 2, 1, *TEXT[1:60], 2]
    assert swift.window_perplexity(marked).readings == swift.window_perplexity(TEXT[:60]).readings
    told = swift.window_perplexity([5, 6, 2]).summary()
    assert told["windows"] == 0 and told["median"] is told["bits_per_byte_worst"] is None


def test_what_a_model_cannot_read_is_told(swift: TokenSwift) -> None:
    assert swift.window_perplexity(TEXT).window == 1000
    long = 4 * TEXT
    with pytest.raises(UserError, match=r"^window: 1100 is not allowed; .* was trained to read at most 1024 tokens$"):
        swift.window_perplexity(long, window=1100)
    with pytest.raises(UserError, match="window: 3 is not allowed; at least 4"):
        swift.window_perplexity(long, window=3)
    with pytest.raises(UserError, match="tokens: 9999 is not allowed"):
        swift.window_perplexity([*TEXT, 9999])


def test_the_summary_has_median_and_worst_and_only_numbers_that_json_has() -> None:
    readings = tuple(Reading(nats, 10, 20) for nats in (10.0, 30.0, 20.0))
    told = WindowPerplexity("judge", 10, readings).summary()
    assert told == {
        "median": pytest.approx(math.exp(2), rel=1e-4), "worst": pytest.approx(math.exp(3), rel=1e-4),
        "bits_per_byte_median": pytest.approx(1 / math.log(2), rel=1e-4),
        "bits_per_byte_worst": pytest.approx(1.5 / math.log(2), rel=1e-4),
        "windows": 3, "window": 10, "judge": "judge",
    }  # fmt: skip
    told = WindowPerplexity("judge", 10, (Reading(1e6, 10, 0),)).summary()
    assert told["worst"] is told["bits_per_byte_worst"] is None
    json.dumps(told, allow_nan=False)


def letters(tokens: Any) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


def test_a_repeating_window_is_the_worst_and_the_looping_one() -> None:
    rng = np.random.default_rng(0)
    varied, looping = rng.integers(0, 26, 200).tolist(), [1, 2, 3, 4, 5] * 40
    found = window_quality(varied + looping + varied[::-1] + [7] * 199, letters, window=200)
    assert found.looping == (1,) and len(found.distinct_4) == 3  # the rest, shorter than a window, is left out
    assert found.distinct_4[1] == pytest.approx(5 / 197) and min(found.distinct_4[::2]) > 0.99
    assert found.compression[1] > 8 > 2 > max(found.compression[::2])
    told = found.summary()
    assert told["distinct_4_worst"] == found.distinct_4[1] and told["compression_worst"] == found.compression[1]
    assert told["distinct_4_median"] > 0.99 and told["compression_median"] < 2


def test_a_text_that_varies_each_round_is_no_loop_but_compresses() -> None:
    sentence = list(range(24))
    text = [token for n in range(20) for token in (*sentence[: n % 24], 25, *sentence[n % 24 :])]
    found = window_quality(text, letters, window=500)
    assert found.looping == () and found.compression[0] > 4


def test_a_short_text_is_one_window_and_a_tiny_one_is_refused() -> None:
    assert len(window_quality([1, 2, 3, 4, 5], letters).distinct_4) == 1
    with pytest.raises(ValueError, match="tokens: 3 is not allowed"):
        window_quality([1, 2, 3], letters)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of two answers, written without --quality."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--dtype", "fp32", "--max-new-tokens", "300", "--seed", "3", "--chapters", "2", "--logit-bias", "2=6"]
    flags += ["--min-chapter-tokens", "90", "--quiet", "--prompt", "the cat"]
    assert main([*flags, "--model", str(tiny_folder), "--out", str(folder)]) == 0
    return folder


def test_a_run_is_read_without_its_forced_turns_and_nothing_is_written(
    run: Path, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["quality", str(run), "--window", "40", "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["texts"]  # NaN is not JSON
    record = journal.read(run)
    letters_of = AutoTokenizer.from_pretrained(record.header["origin"]["model"]).decode
    chosen = [t for t, forced in zip(record.tokens, record.forced, strict=True) if not forced and t not in (0, 1, 2)]
    assert any(record.forced) and found["tokens"] == len(chosen) and found["windows"] == len(chosen) // 40
    for window in found["per_window"]:
        part = chosen[40 * window["window"] :][:40]
        assert window["perplexity"] == pytest.approx(math.exp(loss(reference, part)), rel=1e-3)
        assert letters_of(part).startswith(window["first_words"]) and window["first_words"]
    assert found["window_perplexity"]["worst"] == max(window["perplexity"] for window in found["per_window"])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_write_changes_one_field_of_the_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = json.loads((folder / "report.json").read_text())
    assert before["window_perplexity"] is None
    assert main(["quality", str(folder), "--write", "--human", "--window", "50", "--per-window"]) == 0
    told = capsys.readouterr().out
    assert "human: docs" in told and "human: code" in told and "bits/byte" in told and "loops" in told
    after = json.loads((folder / "report.json").read_text())
    assert after.pop("window_perplexity")["windows"] > 0
    before.pop("window_perplexity")
    assert after == before and sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in run.iterdir())


def test_the_worst_window_stands_first_with_its_words(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("the cat and the dog and the bird sat on the mat, " * 6 + "ZQXJ ZKWV" * 8)
    command = ["quality", "--text", str(tmp_path / "text"), "--model", str(tiny_folder), "--window", "30"]
    assert main([*command, "--per-window", "--json", str(tmp_path / "json")]) == 0
    lines = capsys.readouterr().out.split("begins\n")[1].splitlines()
    shown = [float(line.split()[2]) for line in lines]
    assert shown == sorted(shown, reverse=True)
    (found,) = json.loads((tmp_path / "json").read_text())["texts"]
    assert len(shown) == len(found["per_window"]) > 2
    for line in lines:
        assert repr(found["per_window"][int(line.split()[0])]["first_words"]) in line


def test_another_judge_reads_the_text_in_tokens_of_its_own(
    run: Path, with_bos: Path, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--window", "60", "--judge", str(with_bos), "--dtype", "fp32", "--json", "-"]
    assert main(["quality", str(run), *flags]) == 0
    (found,) = json.loads(capsys.readouterr().out)["texts"]
    assert found["window_perplexity"]["judge"] == str(with_bos)
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    chosen = [token for token in journal.read(run).chosen_tokens if token > 2]
    text = tokenizer.decode(chosen[:60])
    ids = tokenizer(text).input_ids
    assert ids[0] == 0
    bits = loss(reference, ids) * (len(ids) - 1) / math.log(2) / len(text.encode())
    assert found["per_window"][0]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_quality_puts_the_figure_into_report_and_summary(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_folder), "--dtype", "fp32", "--prompt", "the cat", "--max-new-tokens", "60"]
    out = tmp_path / "run"
    assert main([*flags, "--seed", "3", "--ignore-eos", "--quality", "--out", str(out)]) == 0
    told = json.loads((out / "report.json").read_text())["window_perplexity"]
    assert f"one window, read alone by {tiny_folder}: perplexity {told['median']} (worst" in capsys.readouterr().err
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")
    result = swift.generate("the cat", max_new_tokens=60, seed=3, ignore_eos=True)
    assert result.report["window_perplexity"] is None
    assert swift.window_perplexity(result).summary() == told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "DIR: None is not allowed; a run's folder, --text FILE or --human"),
        (["nowhere"], "journal: 'nowhere/journal.bin' is not allowed"),
        (["RUN", "--window", "2"], "window: 2 is not allowed; at least 4"),
        (["RUN", "--window", "9000", "--text", "LONG"], "window: "),
        (["RUN", "--json", "RUN/report.json"], "json: "),
        (["--text", "nowhere"], "text: 'nowhere' is not allowed"),
        (["RUN", "--model", "OTHER"], "model: "),
        (["RUN", "--model", "BOS"], "tokenizer: "),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    run: Path, with_bos: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """OTHER: another family's weights under the same tokenizer; BOS: the same weights under another tokenizer."""
    (tmp_path / "long").write_text("zq " * 2000)
    if "OTHER" in arguments:
        save_tiny(tmp_path / "other", "qwen3")
    places = {"RUN": str(run), "BOS": str(with_bos), "OTHER": str(tmp_path / "other"), "LONG": str(tmp_path / "long")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    capsys.readouterr()
    assert main(["quality", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"tokenswift: {says}") and printed.err.count("\n") == 1


def test_texts_too_short_to_be_read_stand_in_the_table(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("z")
    assert main(["quality", "--text", str(tmp_path / "text"), "--model", str(tiny_folder), "--per-window"]) == 0
    assert "0 of 1000" in capsys.readouterr().out


def test_a_run_without_a_report_is_not_written_to(run: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(run / "journal.bin", tmp_path)
    assert main(["quality", str(tmp_path), "--write"]) == 2
    assert "a finished run's folder, with a report.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["journal.bin"]


@pytest.mark.model
def test_salad_reads_worse_than_prose_though_it_is_as_varied() -> None:
    """data/salad.json is of a story that the default model wrote under YaRN 15x: its first 1 000 tokens, which are
    prose, and 1 000 from 30 000 and from 70 000 on, which are word salad. Measured, in bits a byte: 0.91 at first, 1.62
    to 1.72 in the two windows of salad; 0.84 to 1.02 in the human ones."""
    swift = TokenSwift.from_pretrained()
    decode, written = quality.decoder(swift.tokenizer), json.loads((DATA / "salad.json").read_text())
    prose, salad = written["first"], written["salad"]
    docs, code = (continuation(name, swift.tokenizer, 1000).tokens for name in ("docs", "code"))
    first, later, human = (swift.window_perplexity(part).readings for part in (prose, salad, docs + code))
    assert [len(readings) for readings in (first, later, human)] == [1, 2, 2]

    def middle(readings: Sequence[Reading], unit: str) -> float:
        return float(np.median([getattr(reading, unit) for reading in readings]))

    for other in (first, human):
        assert min(reading.bits_per_byte for reading in later) > 1.5 * middle(other, "bits_per_byte")
        assert middle(later, "perplexity") > 1.2 * middle(other, "perplexity")
    varied = [window_quality(part, decode).summary()["distinct_4_median"] for part in (salad, docs)]
    assert varied[0] > 0.95 * varied[1], "distinct-4 does not see it"
