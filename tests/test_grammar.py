"""A text is of its grammar, whatever drafts it: masks are right and a function of the tokens before, every drafter
writes what plain decoding writes, forced tokens are drafts that are always right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from conftest import decoder_of, tiny_config, tiny_model, tiny_tokenizer
from random_heads import random_heads
from schemas import random_schema
from scripted import write
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.main import main
from tokenswift_py.core import DraftTree, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.base import create, forced
from tokenswift_py.drafters.cascade import Cascade
from tokenswift_py.drafters.heads import Heads
from tokenswift_py.errors import NumericsError
from tokenswift_py.runs import audit, journal
from tokenswift_py.runs.journal import Journal
from tokenswift_py.sampling.grammar import Follower, Grammar, Vocabulary
from tokenswift_py.sampling.reference import Sampler

EOS = (2, 0)  # of the tiny tokenizer
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "animals": {"type": "array", "items": {"enum": ["the cat", "the dog", "the bird"]}, "maxItems": 4},
    },
    "required": ["name", "age", "animals"],
    "additionalProperties": False,
}
LARK = """start: line{3,9}
line: ANIMAL " " ("sat" | "began" | "ran") (" on the " PLACE)? "\\n"
ANIMAL: "the " /[a-d]/ ("at" | "og" | "ird")
PLACE: /[a-z]{2,6}/
"""
LANGUAGES = {"json_schema": json.dumps(PERSON), "grammar": LARK, "regex": r"(the (cat|dog) [0-9]{2,4}, ){4,9}then rain"}
SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, min_p=0.01, penalty=1.1, dry_multiplier=0.5, seed=5),
}


def byte_fallback() -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes them: words begin with a bar, whatever is unknown is written in bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁{}":,[]abcdehnortu0123456789']
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("n", "a"), ('"', ":")]
    vocab = {word: number for number, word in enumerate([*words, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


TOKENIZERS: dict[str, tuple[Callable[[], Any], Sequence[int]]] = {
    "byte level": (tiny_tokenizer, EOS),
    "byte fallback": (byte_fallback, (2,)),
}


def vocabulary(kind: str = "byte level", padding: int = 3) -> tuple[Any, Vocabulary]:
    make, eos = TOKENIZERS[kind]
    tokenizer = make()
    return tokenizer, Vocabulary(tokenizer, len(tokenizer) + padding, eos)


def follower(kind: str, text: str, vocab: Vocabulary | None = None) -> Follower:
    return Follower(Grammar(kind, text, vocab or vocabulary()[1]))


# Masks


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes that a token adds to a text; None for one that is no text."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None or piece in tokenizer.all_special_tokens or token in tokenizer.added_tokens_decoder:
        return None
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    if "<0x41>" in tokenizer.get_vocab():
        return str(piece).replace("▁", " ").encode()
    text = str(tokenizer.backend_tokenizer.decoder.decode([piece]))
    return b"?" if "\ufffd" in text else text.encode()  # of half a character no pattern here has need


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"[ab]{2,5}c?(the|cat)*", r"((the|bat) 1{1,2}){2,3}(cat)?", r"a(b|c(d|e){1,3}a)*"])
def test_the_mask_is_what_the_grammar_lets_follow(kind: str, pattern: str) -> None:
    """Against the partial matches of another engine of regular expressions. Without forcing, which leaves of all ways
    to write one text the tokenizer's own."""
    tokenizer, vocab = vocabulary(kind)
    lark = f'%llguidance {{"no_forcing": true}}\nstart: /{pattern}/\n'
    grammar, rng = follower("grammar", lark, vocab), np.random.default_rng(0)
    pieces = [token_bytes(tokenizer, token) for token in range(vocab.size)]
    for _ in range(6):
        history, text = History([9, 9, 9]), b""
        grammar.begin_chapter(3)
        for _ in range(12):
            outside = grammar.outside(history)
            fits = {
                token
                for token, piece in enumerate(pieces)
                if piece and regex.fullmatch(pattern.encode(), text + piece, partial=True)
            }
            fits |= vocab.eos if regex.fullmatch(pattern.encode(), text) else frozenset()
            assert set(np.flatnonzero(~outside).tolist()) == fits, text
            token = int(rng.choice(sorted(fits)))
            history.append(token)
            if token in vocab.eos:
                break
            text += pieces[token] or b""
        assert grammar.holds(history)


def chosen_at_random(grammar: Follower, rng: np.random.Generator, most: int = 80) -> list[int]:
    history = History()
    while len(history) < most and not (len(history) and history[-1] in grammar.grammar.vocabulary.eos):
        history.append(int(rng.choice(np.flatnonzero(~grammar.outside(history)))))
    return history.tokens.tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_mask_is_a_function_of_the_tokens_before(kind: str, language: str) -> None:
    """Whatever was asked before: guesses that were forgotten, other histories, tokens that the grammar refuses."""
    _, vocab = vocabulary(kind)
    grammar, rng = follower(language, LANGUAGES[language], vocab), np.random.default_rng(1)
    texts = [chosen_at_random(grammar, rng) for _ in range(4)]
    alone = [[follower(language, LANGUAGES[language], vocab).mask(History(text[:n])) for n in range(0, len(text), 3)]
             for text in texts]  # fmt: skip
    history = History()
    for _ in range(60):
        which = int(rng.integers(len(texts)))
        place = int(rng.integers(len(alone[which])))
        if rng.random() < 0.5:
            history = History()
        with history.guesses():
            kept = int(rng.integers(len(history) + 1))
        history.truncate(kept if history.tokens[:kept].tolist() == texts[which][:kept] else 0)
        history.extend(texts[which][len(history) : 3 * place])
        history.truncate(min(len(history), 3 * place))
        assert (grammar.mask(history) == alone[which][place]).all()
        with history.guesses():
            history.extend(rng.integers(0, vocab.size, rng.integers(0, 4)).tolist())
            grammar.forced(history)


@pytest.mark.parametrize(
    "params", [*SAMPLINGS.values(), SamplingParams(temperature=1.3, top_k=3, logit_bias={9: 30.0})]
)
def test_every_sampler_chooses_what_the_reference_chooses_of_the_logits_that_are_left(params: SamplingParams) -> None:
    """The reference without a grammar, given the logits of what it allows, is the measure."""
    kinds: list[Any] = [Sampler]
    if pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built"):
        from tokenswift_py.sampling.native import NativeSampler

        kinds.append(NativeSampler)
    _, vocab = vocabulary()
    grammar, plain = follower("regex", LANGUAGES["regex"], vocab), Sampler(params, vocab.size)
    samplers = [kind(params, vocab.size) for kind in kinds]
    for sampler in samplers:
        sampler.grammar = grammar
    for number, token in enumerate(text := chosen_at_random(grammar, np.random.default_rng(2), 40)):
        history, logits = History(text[:number]), 3 * torch.randn(vocab.size)
        left = logits.masked_fill(torch.from_numpy(grammar.outside(history)), -torch.inf)
        ranked = plain.rank(left, history, 3)
        assert [sampler.rank(logits, history, 3) for sampler in samplers] == [ranked] * len(samplers)
        forced = grammar.forced(history)
        assert forced is None or ranked == [forced] == [token]


class Poisoned:
    """A matcher that ends in an error for good once it was shown a token, as at a limit of its own."""

    def __init__(self, matcher: Any, token: int, when: str):
        self._matcher, self._token, self._when, self.error = matcher, token, when, False
        self._shown = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def is_error(self) -> bool:
        return self.error

    def get_error(self) -> str:
        return "too many items"

    def try_consume_tokens(self, tokens: list[int]) -> int:
        self._shown = self._token in tokens
        self.error |= self._shown and self._when == "shown"
        return 0 if self.error else int(self._matcher.try_consume_tokens(tokens))

    def compute_bitmask(self) -> bytes:
        self.error |= self._shown
        return bytes(self._matcher.compute_bitmask())


@pytest.mark.parametrize("when", ["shown", "masked"])
def test_a_limit_that_a_guess_meets_does_not_end_the_text(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, vocab = vocabulary()
    made = Grammar("regex", "[ab]{2,9}", vocab)
    a, b = (vocab_token(vocab, made, letter) for letter in "ab")
    plain = Follower(made).mask(History([a])).tolist()
    matcher = made.matcher
    monkeypatch.setattr(made, "matcher", lambda: Poisoned(matcher(), b, when))
    grammar, history = Follower(made), History([a])
    with history.guesses():
        history.append(b)
        with pytest.raises(NumericsError, match="cannot be followed beyond position 2: too many items"):
            grammar.mask(history)
        context = SimpleNamespace(sampler=grammar, history=history)
        assert forced(context) is None  # type: ignore[arg-type]
    assert grammar.mask(history).tolist() == plain


def vocab_token(vocab: Vocabulary, grammar: Grammar, letter: str) -> int:
    """The token that is this letter alone."""
    first = Follower(grammar).outside(History())
    tokenizer, _ = vocabulary()
    return next(t for t in np.flatnonzero(~first).tolist() if tokenizer.decode([t]) == letter)


def test_a_sampler_on_a_gpu_masks_every_node_behind_its_own_path() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")
    from tokenswift_py.sampling.triton import TritonSampler

    tokenizer, vocab = vocabulary()
    one, other = ([tokenizer.convert_tokens_to_ids(letter) for letter in word] for word in ("aba", "bbc"))
    tree = DraftTree([7, *one, *other], [-1, 0, 1, 2, 0, 4, 5])
    params = SamplingParams(temperature=0.9, penalty=1.2, ban=(other[2],), seed=1)
    samplers = [kind(params, vocab.size) for kind in (Sampler, TritonSampler)]
    for sampler in samplers:
        sampler.grammar = follower("regex", "[ab]{1,3}c?d*", vocab)
        sampler.begin_chapter(1)
    history, logits = History([7]), 3 * torch.randn(len(tree), vocab.size)
    on_device = samplers[1].chooser(tree, logits, history)
    for node in range(len(tree)):
        with history.guesses():
            history.extend(tree.tokens[tree.path(node)[1:]].tolist())
            assert on_device(node) == samplers[0].choose(logits[node], history)


# Drafts


VOCAB = len(tiny_tokenizer())
PROMPT = tiny_tokenizer().encode("the cat and the dog and the bird sat on the mat")


@pytest.fixture(scope="module")
def decoder() -> Any:
    """In float64, whose tokens do not change with the number of rows in a pass."""
    return decoder_of(tiny_model(tiny_config(vocab_size=VOCAB)))


def drafter_of(name: str, decoder: Any) -> Any:
    if name == "draft_model":
        config = tiny_config("qwen2", vocab_size=VOCAB, num_hidden_layers=1, hidden_size=32, num_attention_heads=4)
        return create(name, model=decoder_of(tiny_model(config, seed=1)))
    heads = [Heads(random_heads(form, vocab=VOCAB), decoder.weights["model.embed_tokens.weight"])
             for form in ("medusa", "recurrent")]  # fmt: skip
    made = {"medusa heads": heads[0], "recurrent heads": heads[1], "cascade with heads": Cascade(heads=heads[1])}
    return made.get(name) or create(name)


DRAFTERS = (
    "ngram", "partial", "cascade", "draft_model", "medusa heads", "recurrent heads", "cascade with heads",
)  # fmt: skip


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    ("language", "sampling"),
    [("json_schema", "greedy"), ("json_schema", "sampled"), ("grammar", "sampled"), ("regex", "greedy")],
)
def test_no_drafter_changes_a_token(decoder: Any, name: str, language: str, sampling: str) -> None:
    _, vocab = vocabulary(padding=0)

    def written(drafter: Any, size: int | None) -> tuple[list[int], Any, str | None]:
        grammar = follower(language, LANGUAGES[language], vocab)
        tokens, loop, steps = write(
            decoder, PROMPT, 60, SAMPLINGS[sampling], drafter, VOCAB, EOS, grammar=grammar, draft_tokens=size
        )
        return tokens, loop, steps[-1].ending

    plain, _, ending = written(None, None)
    assert ending in ("eos", "length") and len(plain) > 20
    for size in (None, 6):
        drafted, loop, ended = written(drafter_of(name, decoder), size)
        assert (drafted, ended) == (plain, ending)
        assert loop.stats.num_accepted_draft_tokens > 0
        assert loop.cache.pool.in_use == 0


@pytest.mark.parametrize("name", DRAFTERS)
def test_forced_tokens_are_drafts_that_are_always_right(decoder: Any, name: str) -> None:
    """A text of which nothing is open is drafted as far as trees go, by no pass of a draft. Its end is chosen, and no
    row is computed for it."""
    tokenizer = tiny_tokenizer()
    text = '{"the cat": "sat", "and then": "the rain began"}'
    drafter, passes = drafter_of(name, decoder), []
    for model in (decoder, getattr(drafter, "model", decoder)):
        model.forward = counted(type(model).forward.__get__(model), passes)
    grammar = follower("regex", regex.escape(text), Vocabulary(tokenizer, VOCAB, EOS[:1]))
    tokens, loop, steps = write(
        decoder, PROMPT, 90, SAMPLINGS["sampled"], drafter, draft_tokens=6, grammar=grammar, vocab=VOCAB, eos=EOS[:1]
    )
    assert tokenizer.decode(tokens[:-1]) == text and steps[-1].ending == "eos"
    assert loop.stats.num_draft_tokens - 1 == loop.stats.num_accepted_draft_tokens == len(tokens) - len(steps)
    assert len(steps) == 1 + -(-(len(tokens) - 1) // 7)
    assert len(passes) <= len(steps) + 3


def counted(forward: Any, passes: list[int]) -> Any:
    def counting(segments: Any, *rest: Any, **wants: Any) -> Any:
        passes.append(len(segments[0].tree))
        return forward(segments, *rest, **wants)

    return counting


# Whole runs


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", engine="native", threads=1)


def valid(schema: Any, text: str) -> bool:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    return True


def texts_of_schemas(swift: TokenSwift, count: int) -> tuple[int, int, int]:
    """Whole texts, those that max_new_tokens cut, schemas that llguidance refuses. Half are drafted, half plain."""
    whole = cut = refused = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        schema, temperature = random_schema(rng), float(rng.choice([0.0, 0.7, 1.2]))
        settings = {"json_schema": schema, "temperature": temperature, "seed": seed, "max_new_tokens": 700}
        try:
            result = swift.generate("the cat", drafter=("none", "cascade")[seed % 2], on_loop="ignore", **settings)
        except UserError:
            refused += 1
            continue
        whole += result.ending == "eos" and valid(schema, result.text)
        cut += result.ending == "length"
        assert result.ending in ("eos", "length")
    return whole, cut, refused


def test_random_schemas_give_valid_json(swift: TokenSwift) -> None:
    whole, cut, refused = texts_of_schemas(swift, 24)
    assert whole >= 22 and cut <= 2 and refused <= 1


@pytest.mark.soak
def test_a_thousand_random_schemas_give_valid_json(swift: TokenSwift) -> None:
    whole, cut, refused = texts_of_schemas(swift, 1000)
    print(f"{whole} whole and valid, {cut} cut by max_new_tokens, {refused} schemas refused")
    assert whole >= 960 and cut <= 30 and refused <= 10


RUN: dict[str, Any] = {"max_new_tokens": 200, "seed": 2, "temperature": 0.9, "chapters": ["and then", "the rain"],
                       "context": 500}  # fmt: skip


def test_each_chapter_is_a_text_of_the_grammar_and_is_proven(swift: TokenSwift, tmp_path: Path) -> None:
    with swift.stream("the cat", out=tmp_path / "run", json_schema=PERSON, **RUN) as stream:
        list(stream)
    result = stream.result()
    assert result.ending == "eos" and len(result.forced) == 2
    assert all(valid(PERSON, text) for text in result.text.split("\n\n"))
    found = audit.audit(swift, tmp_path / "run", sample=1)
    assert found.passed and found.proof
    found_record = journal.read(tmp_path / "run")
    assert found_record.header["grammar"].startswith("llguidance")
    assert found_record.header["parameters"]["json_schema"] == json.dumps(PERSON)
    # resumed after every block of tokens
    for cut in range(1, len(result.tokens), 23):
        if any(start <= cut <= stop for start, stop in result.forced):
            continue
        target = tmp_path / f"cut {cut}"
        again = Journal.create(target, found_record.header)
        again._pending = list(zip(found_record.tokens[:cut], found_record.forced[:cut], strict=True))
        again.close()
        with swift.resume(target, json_schema=json.dumps(PERSON, indent=1)) as resumed:
            list(resumed)
        assert resumed.result().tokens == result.tokens and resumed.ending == "eos"


def test_a_record_outside_of_its_grammar_is_told_at_its_place(swift: TokenSwift, tmp_path: Path) -> None:
    with swift.stream("the cat", out=tmp_path / "run", json_schema=PERSON, **RUN) as stream:
        list(stream)
    found = journal.read(tmp_path / "run")
    tokens = list(found.tokens)
    tokens[6] = 40
    forged = Journal.create(tmp_path / "forged", found.header)
    forged._pending = list(zip(tokens, found.forced, strict=True))
    forged.close()
    told = audit.audit(swift, tmp_path / "forged")
    assert not told.passed and told.faults[0] == "token 6: the grammar has no place for it"
    with pytest.raises(UserError, match="token 6: the grammar has no place for it"):
        swift.resume(tmp_path / "forged")
    with pytest.raises(UserError, match=r"json_schema: .* is not allowed; the run was written with"):
        swift.resume(tmp_path / "run", json_schema={"type": "integer"})
    with pytest.raises(UserError, match=r"grammar: .* is not allowed; the run was written with None"):
        swift.resume(tmp_path / "run", grammar='start: "a"')


def test_bans_biases_and_stop_strings_go_along(swift: TokenSwift) -> None:
    settings: dict[str, Any] = {"regex": "(the (cat|dog), ){1,9}end", "temperature": 0, "max_new_tokens": 90}
    text = swift.generate("the", **settings).text
    assert regex.fullmatch(settings["regex"], text)
    dog, cat = (swift.tokenizer.encode(word)[0] for word in ("dog", "cat"))
    for banned, left in ((dog, "cat"), (cat, "dog")):
        assert left in swift.generate("the", logit_bias={banned: -50.0}, **settings).text
    stopped = swift.generate("the", stop=[", "], **settings)
    assert stopped.ending == "stop" and regex.fullmatch("the (cat|dog)", stopped.text)
    comma = swift.tokenizer.encode(",")[0]
    for drafter in ("none", "cascade"):
        with pytest.raises(
            NumericsError, match=r"no token is left to choose from at position .* beside what the grammar"
        ):
            swift.generate("the", ban=[comma], drafter=drafter, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"json_schema": "{"}, "json_schema: it is no JSON"),
        ({"json_schema": "[]"}, "json_schema: '[]' is not allowed; a JSON schema, which is an object"),
        ({"json_schema": {"type": "cat"}}, "json_schema: Invalid type: cat"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "json_schema: Unsatisfiable schema"),
        ({"json_schema": {1, 2}}, "json_schema: it is no JSON"),
        ({"grammar": "start: cat"}, 'grammar: at 1(8): unknown name: "cat"'),
        ({"grammar": ""}, "grammar: '' is not allowed; a text, not empty"),
        ({"regex": "(a"}, "regex: "),
        ({"regex": "a", "grammar": "start: b"}, "grammar: 'start: b' is not allowed; only one of json_schema, grammar"),
        ({"regex": "a", "min_new_tokens": 3}, "min_new_tokens: 3 is not allowed; not with regex, which says where"),
        ({"regex": "a", "min_chapter_tokens": 3}, "min_chapter_tokens: 3 is not allowed; not with regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos: True is not allowed; not with regex"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(swift: TokenSwift, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as told:
        swift.stream("the cat", **{"max_new_tokens": 9, **settings})
    assert str(told.value).startswith(says) and "\n" not in str(told.value)


def test_a_vocabulary_that_cannot_write_it_is_told() -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "cat": 1, "dog": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>")
    with pytest.raises(UserError, match="grammar: llguidance cannot read this model's tokenizer"):
        Vocabulary(tokenizer, 3, [0])
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>")
    with pytest.raises(UserError, match="this model's tokenizer has no token that begins such a text"):
        Grammar("regex", "the (cat|dog)", Vocabulary(tokenizer, 3, [0]))
    with pytest.raises(UserError, match="this model has no end-of-sequence token to end its text"):
        Vocabulary(tokenizer, 3, [])


def test_the_command_line_takes_files_and_texts(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["--model", str(tiny_folder), "--engine", "torch", "--dtype", "fp32", "--prompt", "the", "--quiet"]
    command += ["--temperature", "0", "--max-new-tokens", "120"]
    (tmp_path / "schema.json").write_text(json.dumps(PERSON, indent=2))
    (tmp_path / "grammar.lark").write_text('start: "the cat " /[0-9]{3}/\n')
    texts = []
    for given in (
        ("--json-schema", str(tmp_path / "schema.json")), ("--json-schema", json.dumps(PERSON)),
        ("--grammar", str(tmp_path / "grammar.lark")), ("--grammar", 'start: "the cat " /[0-9]{3}/'),
        ("--regex", "the cat [0-9]{3}"),
    ):  # fmt: skip
        assert main([*command, *given]) == 0
        texts.append(capsys.readouterr().out.rstrip("\n"))
    assert valid(PERSON, texts[0]) and texts[0] == texts[1]
    assert regex.fullmatch("the cat [0-9]{3}", texts[2]) and texts[2:4] == texts[3:5]
    assert main([*command, "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "json_schema: " in capsys.readouterr().err


@pytest.mark.model
def test_the_default_model_writes_of_a_schema_what_plain_decoding_writes() -> None:
    swift = TokenSwift.from_pretrained()
    settings: dict[str, Any] = {"json_schema": PERSON, "max_new_tokens": 120, "temperature": 0.7, "seed": 1}
    plain = swift.generate("Describe a person who has animals.", drafter="none", **settings)
    assert plain.ending == "eos" and valid(PERSON, plain.text)
    for drafter in ("ngram", "cascade"):
        drafted = swift.generate("Describe a person who has animals.", drafter=drafter, **settings)
        assert drafted.tokens == plain.tokens
        assert drafted.report["mean_acceptance_length"] > 1.2
