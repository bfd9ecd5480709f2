"""The tokens whose logits a draft's passes compute: which they are, the bits of their logits, and that no text depends
on them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from block_products import VOCAB, decoder_with, random_blocks
from native_rows import CONTEXT, config_of, native_of, tokens
from native_rows import isa as isa
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.flags import parser
from tokenswift_py.core import DraftTree, SamplingParams, Segment
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.models.blocks import FORMATS
from tokenswift_py.models.native import NativeDecoder
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.options import Options
from tokenswift_py.planning.vocabulary import LEAST, DraftVocabulary, draft_vocabulary
from toys import save_tiny, tiny_config

TEXTS_OWN = tuple(range(VOCAB - 1, 2, -2))  # rows of all panels of the head, whose copies fill more than one


class Kept:
    """What an engine would be told."""

    def __init__(self) -> None:
        self.first, self.rows = 0, dict[int, int]()

    def put(self, place: int, row: int) -> None:
        self.rows[place] = row


def vocabulary(sizes: list[int], room: int = 4, share: float = 0.3) -> tuple[DraftVocabulary, Kept]:
    kept = Kept()
    return DraftVocabulary(kept, sizes, room, share, sizes[-1] if len(sizes) > 1 else 1000), kept


def whole_and_chosen(decoder: NativeDecoder, first: int, own: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a few rows, by the whole head and by its first rows and these."""
    rows = decoder.weights.native.head_rows(max(1, len(list(own))))
    rows.first = first
    for place, token in enumerate(own):
        rows.put(place, token)
    made = DraftVocabulary(rows, [first], 1, 0.3, decoder.spec.vocab_size)
    cache = decoder.new_cache()
    segment = [Segment(DraftTree.chain(tokens(7)), cache)]
    wanted = decoder.forward(segment, [0, 3, 6]).logits
    cache.drop_tail()
    decoder.vocabulary = made
    found = decoder.forward(segment, [0, 3, 6]).logits
    decoder.vocabulary = None
    return wanted, found


def assert_chosen(decoder: NativeDecoder, first: int, own: tuple[int, ...]) -> None:
    wanted, found = whole_and_chosen(decoder, first, own)
    inside = np.array(sorted({*range(first), *own}))
    outside = np.setdiff1d(np.arange(decoder.spec.vocab_size), inside)
    assert np.array_equal(wanted[:, inside].numpy().view(np.int32), found[:, inside].numpy().view(np.int32))
    assert (found[:, outside] == -torch.inf).all()
    assert len(wanted[:, outside].unique()) > len(outside), "which were others"


@pytest.mark.parametrize("first", [0, 32, 64])
@pytest.mark.parametrize("kind", FORMATS)
def test_logits_inside_have_the_bits_of_the_whole_head_in_blocks(isa: str, kind: str, first: int) -> None:
    assert_chosen(decoder_with(random_blocks(kind, 256, 3)), first, TEXTS_OWN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_inside_have_the_bits_of_the_whole_head_of_values(isa: str, dtype: torch.dtype) -> None:
    assert_chosen(
        native_of(
            config_of(vocab_size=VOCAB, hidden_size=45, num_attention_heads=3, num_key_value_heads=1, head_dim=8), dtype
        ),
        32,
        TEXTS_OWN,
    )


def test_soft_caps_are_applied(isa: str) -> None:
    config = tiny_config("gemma2", vocab_size=VOCAB, max_position_embeddings=CONTEXT, final_logit_softcapping=0.5)
    decoder = native_of(config)
    assert_chosen(decoder, 32, TEXTS_OWN)
    assert whole_and_chosen(decoder, 32, TEXTS_OWN)[1].isfinite().any(1).all()


def test_a_replaced_token_is_out_again() -> None:
    decoder = native_of(config_of(vocab_size=VOCAB))
    rows = decoder.weights.native.head_rows(2)
    for place, row in ((0, 50), (1, 70), (0, 80)):
        rows.put(place, row)
    decoder.vocabulary = DraftVocabulary(rows, [32], 2, 0.3, VOCAB)
    logits = decoder.forward([Segment(DraftTree.chain([1, 2]), decoder.new_cache())]).logits
    assert logits[0].isfinite().nonzero().flatten().tolist() == [*range(32), 70, 80]


def test_an_engine_refuses_rows_that_there_are_not() -> None:
    decoder = native_of(config_of(vocab_size=VOCAB))
    for room in (0, -1, VOCAB + 1):
        with pytest.raises(ValueError, match=f"room for {room} rows of a head of 83"):
            decoder.weights.native.head_rows(room)
    rows = decoder.weights.native.head_rows(2)
    for first in (-32, 1, 33, 96):
        with pytest.raises(ValueError, match=f"whole panels of {'.*'}, not {first}"):
            rows.first = first
    rows.put(0, 50)
    for place, row, why in (
        (2, 1, "place 2 of 2"), (-1, 1, "place -1"), (1, VOCAB, "row 83 of 83"), (1, -1, "row -1"), (1, 50, "already"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            rows.put(place, row)
    blocks = random_blocks("q8", 64, 1)
    anew = decoder_with(random_blocks("q4", 64, 1))
    of_before = anew.weights.native.head_rows(2)
    anew.weights.native.set_blocks("head", 0, blocks.kind, blocks.data)
    with pytest.raises(ValueError, match="the head was set anew"):
        of_before.put(0, 50)
    other = native_of(config_of(vocab_size=VOCAB))
    other.vocabulary = DraftVocabulary(rows, [32], 2, 0.3, VOCAB)
    with pytest.raises(ValueError, match="the chosen rows are of another head"):
        other.forward([Segment(DraftTree.chain([1]), other.new_cache())])


def test_the_latest_tokens_of_the_texts_are_in() -> None:
    made, kept = vocabulary([32], room=3)
    made.read(np.array([5, 31, 32, 40, 50], np.int32))
    assert kept.first == 32 and sorted(kept.rows.values()) == [32, 40, 50]
    made.read(np.array([32, 60], np.int32))  # which makes 40 the oldest
    assert sorted(kept.rows.values()) == [32, 50, 60] and sorted(kept.rows) == [0, 1, 2]
    made.walked(0, [70, 60])
    assert sorted(kept.rows.values()) == [32, 60, 70]


def test_all_logits_are_computed_until_the_text_has_told_what_suffices() -> None:
    made, kept = vocabulary([2048, 4096, 50_000])
    made.read(np.arange(40_000, 40_100, dtype=np.int32))  # a prompt tells nothing
    assert made.rows is None and made.count == 50_000
    for _ in range(200):
        made.walked(2, [7, 2000, 100])
    assert made.rows is kept and (made.size, kept.first, made.count) == (2048, 2048, 2048 + 4)


def test_a_text_of_other_tokens_gets_as_many_as_it_needs() -> None:
    """An id of each text's own is not in the vocabulary twice, so that it is always missed."""
    for new, wanted in ((3000, 4096), (45_000, 50_000)):
        made, _ = vocabulary([2048, 4096, 50_000])
        for round in range(200):
            made.walked(2, [7, new + round, 100])
        assert made.size == wanted
    for _ in range(2000):  # and the common ones suffice again where the text has changed
        made.walked(2, [7, 9, 100])
    assert made.size == 2048


def test_a_text_recovers_by_its_own_tokens() -> None:
    """All of its tokens come late in the vocabulary, as where they are in another order."""
    made, kept = vocabulary([2048, 50_000], room=64)
    text = np.random.default_rng(0).integers(49_000, 49_050, 3000)
    for start in range(0, 3000, 3):
        made.walked(2, text[start : start + 3].tolist())
    assert made.size == 2048 and set(kept.rows.values()) == set(text.tolist())


def test_long_accepted_chains_make_a_missing_token_dear() -> None:
    sizes = []
    for accepted in (0, 12):
        made, _ = vocabulary([2048, 50_000])
        for round in range(400):
            made.walked(accepted, [7] * accepted + [3000 + round if round % 4 == 0 else 9])
        sizes.append((made.size, made._cost(0, made._lost / made._written)))
    assert sizes[0][1] < sizes[1][1]


def test_dear_tokens_make_more_first_tokens_worth_it() -> None:
    """After long texts a token takes as long as many draft passes, since verification reads the whole cache."""
    sizes = []
    for price in (0.5, 50.0):
        made, _ = vocabulary([2048, 50_000])
        for round in range(400):
            made.walked(2, [7, 9, 3000 + round if round % 20 == 0 else 9], price)
        sizes.append(made.size)
    assert sizes == [2048, 50_000]


def test_a_number_of_tokens_is_kept_to() -> None:
    engine: Any = type("Engine", (), {"head_bytes": 1, "multiplied_bytes": 4, "head_rows": lambda self, room: Kept()})()
    made = draft_vocabulary(engine, 50_000, 4000)
    assert made is not None and made.sizes == [4000]
    for round in range(300):
        made.walked(5, [45_000 + round])
    assert made.size == 4000 and made.rows is not None
    rounded = draft_vocabulary(engine, 50_000, 33)
    assert rounded is not None and rounded.size == 64, "whole panels"
    assert draft_vocabulary(engine, 64, 33) is None and draft_vocabulary(engine, 50_000, 2**62) is None, "all there is"
    assert draft_vocabulary(engine, 50_000, "all") is None and draft_vocabulary(engine, 2 * LEAST, "auto") is None
    auto = draft_vocabulary(engine, 50_000, "auto")
    assert auto is not None and auto.sizes == [8192, 16_384, 32_768, 50_000]


SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, penalty=1.1, penalty_window=64, seed=3),
    "top-n-sigma, XTC": SamplingParams(
        temperature=1.0, top_n_sigma=2.0, xtc_threshold=0.1, xtc_probability=0.5, seed=4
    ),
    "typical": SamplingParams(temperature=1.0, typical_p=0.8, seed=4),
}


@pytest.mark.parametrize("params", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("make", [Partial, Cascade])
def test_a_text_does_not_depend_on_it(make: type[Partial], params: SamplingParams) -> None:
    target = native_of(config_of())
    prompt = tokens(200, 1).tolist()
    plain, _, _ = write(target, prompt, 60, params)
    draft = NativeDecoder(target.weights, rope_tables(config_of(), CONTEXT), draft=True)
    draft.vocabulary = draft_vocabulary(target.weights.native, 61, 1)
    assert draft.vocabulary is not None
    lines: list[dict[str, Any]] = []
    text, loop, _ = write(
        target, prompt, 60, params, make(view_tokens=64), draft_tokens=4, self_draft=draft, trace=lines.append
    )
    assert text == plain
    assert loop.stats.num_accepted_draft_tokens > 0
    own = set(draft.vocabulary._places)
    assert own >= {token for token in (*prompt, *text[:-1]) if token >= 32}
    assert lines[-1]["drafter"]["logits"] == 32 + len(own)


def test_a_draft_guesses_only_what_is_in() -> None:
    """With room for one token beside the first ones, hardly any other can be guessed."""
    target = native_of(config_of())
    rope = rope_tables(config_of(), CONTEXT)
    rows = target.weights.native.head_rows(1)
    draft = NativeDecoder(target.weights, rope, draft=True, vocabulary=DraftVocabulary(rows, [32], 1, 0.3, 61))
    lines: list[dict[str, Any]] = []
    write(target, tokens(90).tolist(), 60, SamplingParams(temperature=2.0, seed=2), Partial(view_tokens=64),
          draft_tokens=4, self_draft=draft, trace=lines.append)  # fmt: skip
    for line in lines:
        guessed = set(line["tree"]["tokens"][1:])
        assert len({token for token in guessed if token >= 32}) <= 1
    assert sum(len(line["tree"]["tokens"]) - 1 for line in lines) > 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(made)
    return made


def test_a_run_may_ask_for_it(folder: Path) -> None:
    swift = TokenSwift.from_pretrained(str(folder), engine="native")
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 0.8, "seed": 2, "draft_tokens": 4, "raw": True}
    plain = swift.generate("the cat and the dog", drafter="none", **settings)
    for asked in ("auto", "all", 1, 32, 100, 10**9):
        found = swift.generate("the cat and the dog", drafter="partial", draft_vocabulary=asked, **settings)
        assert found.tokens == plain.tokens, asked
    rope = rope_tables(swift.checkpoint.config, 64)
    models: list[Any] = [swift.executor.self_draft(rope, "auto", "auto", asked) for asked in ("auto", "all", 32, 32)]
    assert models[0].vocabulary is models[1].vocabulary is None
    assert models[2].vocabulary.size == 32 and models[2].vocabulary is not models[3].vocabulary, "one for each run"


def test_wrong_values_are_told_in_a_line(folder: Path) -> None:
    for wrong in (0, -1, "some", "", 1.5, True, None, 2**70, ["all"]):
        with pytest.raises(UserError, match=r"^draft_vocabulary: .* auto, all or a whole number of at least 1$"):
            Options(draft_vocabulary=wrong)  # type: ignore[arg-type]
    torch_engine = TokenSwift.from_pretrained(str(folder), engine="torch", dtype="fp32")
    allowed = r"^draft_vocabulary: 32 is not allowed; engine torch computes all logits of a draft; engine native"
    with pytest.raises(UserError, match=allowed):
        torch_engine.generate("the cat", drafter="partial", draft_vocabulary=32, max_new_tokens=4)
    for fine in ("auto", "all"):
        assert torch_engine.generate("the cat", drafter="partial", draft_vocabulary=fine, max_new_tokens=4).tokens


def test_the_flag_takes_a_name_or_a_number() -> None:
    for word, value in (("auto", "auto"), ("all", "all"), ("4096", 4096), ("many", "many")):
        assert parser().parse_args(["--draft-vocabulary", word]).draft_vocabulary == value
    assert parser().parse_args([]).draft_vocabulary == "all"
