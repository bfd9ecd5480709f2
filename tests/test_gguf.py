"""--dtype gguf: the file's own blocks reach the engine unchanged, in Hugging Face's order, and a broken file is told in
one line. (What values and configs are read of GGUF files: test_gguf_files.py.)"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import (
    GGUFReader,
    get_tensor_name_map,
)
from gguf.quants import dequantize

from block_products import dequantised
from conftest import decoder_of, tiny_model, tiny_tokenizer
from gguf_writer import ARCHITECTURES, EXACT, KINDS, PAIRED, VALUES, Floats, gguf_config, write_gguf
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints import gguf_folder, loading
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.checkpoints.gguf_tensors import GgufBlocks, GgufIndex
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.models.blocks import Blocks
from tokenswift_py.models.native import NativeDecoder, NativeWeights
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import ModelSpec

pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the native engine is not built")


def reference(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """The file's weights by the gguf package's own dequantisation, in Hugging Face's order."""
    spec, found = ModelSpec.from_config(config), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], spec.layers)
    weights = {}
    for name, shape in spec.shapes().items():
        stem, suffix = name.rsplit(".", 1)
        tensor = found[f"{names.get_name(stem)}.{suffix}"]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        part = stem.split(".")[-1]
        if config.model_type in PAIRED and part in ("q_proj", "k_proj"):
            heads = spec.heads if part == "q_proj" else spec.kv_heads
            values = values.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        weights[name] = torch.from_numpy(np.ascontiguousarray(values))
    return weights


def unpacked(tensor: torch.Tensor | Blocks) -> Floats:
    return dequantised(tensor) if isinstance(tensor, Blocks) else tensor.float().numpy()


def blocks(path: Path, config: Any) -> GgufBlocks:
    return GgufBlocks(GgufIndex(open_gguf(path), ModelSpec.from_config(config)))


def decoder(path: Path, config: Any, threads: int = 2) -> NativeDecoder:
    weights = NativeWeights(ModelSpec.from_config(config), blocks(path, config), torch.int8, threads)
    return NativeDecoder(weights, rope_tables(config, 512))


def forward(model: Any, count: int = 90) -> torch.Tensor:
    tokens = np.random.default_rng(0).integers(0, 250, count)
    logits: torch.Tensor = model.forward([Segment(DraftTree.chain(tokens), model.new_cache(), causal=True)]).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_keeps_the_files_weights(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the engine has, to the bit; other types to blocks of 8 bits."""
    monkeypatch.setattr("tokenswift_py.checkpoints.gguf_tensors.AT_ONCE", 10_000)  # in several pieces
    config = gguf_config("llama", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "tiny.gguf", config, {}, kind)
    tensors, expected = blocks(path, config), reference(path, config)
    for name, tensor in tensors.items():
        values, theirs = unpacked(tensor), expected[name].numpy()
        largest = np.abs(theirs).max(-1, keepdims=True)
        if kind in EXACT or tensor.shape[0] == theirs.size:
            assert np.array_equal(values, theirs), name
        else:
            assert (np.abs(values - theirs) <= largest / 253).all(), name
    if kind not in VALUES:
        kinds = {tensor.kind for tensor in tensors.values() if isinstance(tensor, Blocks)}
        assert kinds == {{"Q4_1": "q4", "Q8_0": "q8"}.get(kind, kind.lower()) if kind in EXACT else "q8"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_logits_are_those_of_the_dequantised_weights(tmp_path: Path, family: str, tied: bool) -> None:
    """Types mixed as llama.cpp mixes them, within one attention layer too."""
    mixed = {"q_proj": "Q4_K", "k_proj": "Q4_0", "v_proj": "Q6_K", "o_proj": "Q5_K", "gate_proj": "Q4_1"}
    mixed |= {"up_proj": "Q5_0", "down_proj": "Q8_0", "embed_tokens": "Q6_K", "lm_head": "F16"}
    config = gguf_config(family, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", config, mixed, "BF16")
    exact = tiny_model(config, torch.float32)
    weights = reference(path, config)
    exact.load_state_dict(weights | ({"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}))
    logits, expected = forward(decoder(path, config)), forward(decoder_of(exact, 512))
    assert (logits - expected).pow(2).mean() < 0.15**2 * expected.pow(2).mean()
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


def test_rows_keep_the_row_law_in_mixed_types(tmp_path: Path) -> None:
    config = gguf_config("qwen3")
    mixed = {"v_proj": "Q6_K", "down_proj": "Q8_0", "up_proj": "IQ4_XS", "gate_proj": "Q5_K", "k_proj": "Q5_0"}
    path = write_gguf(tmp_path / "tiny.gguf", config, mixed, "Q4_K")
    models = [decoder(path, config, threads) for threads in (1, 2, 3, 4)]
    tokens = np.random.default_rng(1).integers(0, 250, 150)
    cache, rows = models[0].new_cache(), []
    for token in tokens:
        rows.append(models[0].forward([Segment(DraftTree.chain([token]), cache)]).logits)
        cache.commit([0])
    alone = torch.cat(rows)
    for model, size in zip(models, (150, 7, 64, 33), strict=True):
        cache, rows = model.new_cache(), []
        for start in range(0, 150, size):
            chunk = tokens[start : start + size]
            rows.append(model.forward([Segment(DraftTree.chain(chunk), cache, causal=True)]).logits)
            cache.commit(range(len(chunk)))
        assert torch.equal(torch.cat(rows), alone)


PANEL = 32  # rows of a packed panel, with AVX-512; the 289 rows of the tiny vocabulary are filled up to whole ones


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in VALUES])
def test_packed_blocks_take_about_the_bits_of_the_file(tmp_path: Path, kind: str) -> None:
    config = gguf_config("llama", vocab_size=len(tiny_tokenizer()))
    path = write_gguf(tmp_path / "tiny.gguf", config, {"embed_tokens": "Q8_0"}, kind)
    tensors = blocks(path, config)
    weights = NativeWeights(ModelSpec.from_config(config), tensors, torch.int8)
    stored = [(tensor.n_bytes, int(tensor.shape[-1])) for tensor in GGUFReader(path).tensors]
    filled = sum(size * -(-rows // PANEL) * PANEL / rows for size, rows in stored)
    assert weights.nbytes == pytest.approx(filled, rel=0.03)  # norms are not in it
    assert tensors.nbytes == pytest.approx(sum(size for size, _ in stored), rel=0.03)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = {"v_proj": "Q6_K", "down_proj": "Q8_0", "embed_tokens": "Q8_0"}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_config("llama"), kinds, "Q4_K")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_run_as_it_is(tiny_gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_gguf), dtype="gguf")
    assert sum(file.stat().st_size for file in own_cache.rglob("*")) < 200_000
    settings: dict[str, Any] = {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0.7, "seed": 5}
    plain = swift.generate("the cat and the dog", drafter="none", **settings)
    for drafter, weights in (("ngram", "bf16"), ("partial", "bf16"), ("partial", "int8")):
        drafted = swift.generate("the cat and the dog", drafter=drafter, draft_weights=weights, **settings)
        assert drafted.tokens == plain.tokens
    assert plain.report["dtype"] == "gguf"
    assert "/q4_k+q6_k+q8-block32/kv-bf16/" in plain.report["numerics"]
    assert swift.checkpoint.eos == (2, 0)  # <|endoftext|> ends a text, too
    monkeypatch.setattr(gguf_folder, "write_tokenizer", None)
    again = TokenSwift.from_pretrained(str(tiny_gguf), dtype="gguf", kv_dtype="fp32")
    assert "/kv-fp32/" in again.generate("the cat", max_new_tokens=3).report["numerics"]


def test_int8_drafts_of_a_file_are_its_own_blocks(tiny_gguf: Path, own_cache: Path) -> None:
    """They have the logits of a run of these blocks, to the bit, and change no token of a run in bf16."""
    swift, whole = (TokenSwift.from_pretrained(str(tiny_gguf), dtype=dtype) for dtype in ("bf16", "gguf"))
    rope = rope_tables(swift.checkpoint.config, 512)
    draft = swift.executor.self_draft(rope, "int8", "own")
    assert torch.equal(forward(draft), forward(whole.executor.model(rope)))
    settings: dict[str, Any] = {"max_new_tokens": 70, "ignore_eos": True, "temperature": 0.7, "seed": 5}
    plain = swift.generate("the cat and the dog", drafter="none", **settings)
    drafted = swift.generate("the cat and the dog", drafter="partial", draft_weights="int8", **settings)
    assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in VALUES])
def test_a_file_of_one_type_has_transformers_logits(
    tmp_path: Path, own_cache: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the dequantised weights in fp32, but for activations in blocks of 8 bits; nothing is rounded, or said."""
    config = gguf_config("qwen2", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "tiny.gguf", config, {"lm_head": "Q6_K"}, kind)
    swift = TokenSwift.from_pretrained(str(path), dtype="gguf", kv_dtype="fp32")
    theirs = tiny_model(config, torch.float32)
    theirs.load_state_dict(reference(path, config))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (1, 90)))
    with torch.inference_mode():
        expected = theirs(tokens).logits[0]
    logits = forward(swift.executor.model(rope_tables(config, 512)))
    assert (logits - expected).pow(2).mean() < 0.1**2 * expected.pow(2).mean()
    assert "rounded" not in caplog.text


def test_one_line_says_which_types_are_rounded(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama"), {"v_proj": "Q3_K", "o_proj": "Q2_K"}, "Q4_K")
    TokenSwift.from_pretrained(str(path), dtype="gguf")
    lines = [record.message for record in caplog.records if "rounded" in record.message]
    assert lines == ["tiny.gguf: Q2_K, Q3_K: rounded to blocks of 8 bits"]


def test_blocks_compute_about_what_their_values_do(tiny_gguf: Path, own_cache: Path) -> None:
    blocks, values = (TokenSwift.from_pretrained(str(tiny_gguf), dtype=dtype) for dtype in ("gguf", "fp32"))
    assert blocks.checkpoint.folder == values.checkpoint.folder
    rope = rope_tables(blocks.checkpoint.config, 512)
    logits, expected = (forward(swift.executor.model(rope)) for swift in (blocks, values))
    assert (logits - expected).pow(2).mean() < 0.15**2 * expected.pow(2).mean()


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        TokenSwift.from_pretrained(str(path), **{"dtype": "gguf", "engine": "native", **settings})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_that_is_no_gguf_is_refused(tiny_folder: Path) -> None:
    assert "dtype: 'gguf' is not allowed; only for a .gguf file" in refused(tiny_folder)
    assert "model: some-owner/some-model is neither here nor to be had from the hub" in refused("some-owner/some-model")
    assert "existing .gguf file" in refused("missing.gguf")


def test_blocks_need_the_native_engine(tiny_gguf: Path, own_cache: Path) -> None:
    assert "with engine torch one of bf16, fp32; engine native has gguf" in refused(tiny_gguf, engine="torch")


def test_memory_is_asked_for_what_the_blocks_take(
    tiny_gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 2**28)
    packed = loading.open_checkpoint(str(tiny_gguf), dtype="gguf").weight_bytes("gguf")
    assert packed < tiny_gguf.stat().st_size * 1.2
    assert f"memory: '{packed / 2**20:.0f} MiB'" in refused(tiny_gguf)


def copy_of(source: Path, target: Path, content: bytes) -> Path:
    target.mkdir(exist_ok=True)
    (target / "broken.gguf").write_bytes(content)
    return target / "broken.gguf"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99, 0.9999])
def test_a_file_that_was_cut(tiny_gguf: Path, own_cache: Path, tmp_path: Path, share: float) -> None:
    content = tiny_gguf.read_bytes()
    assert "broken.gguf" in refused(copy_of(tiny_gguf, tmp_path / "cut", content[: int(share * len(content))]))


def test_a_file_cut_after_it_was_opened(tiny_gguf: Path, own_cache: Path, tmp_path: Path) -> None:
    path = copy_of(tiny_gguf, tmp_path / "late", tiny_gguf.read_bytes())
    checkpoint = loading.open_checkpoint(str(path), dtype="gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    for weights in (checkpoint.blocks(), checkpoint.tensors()):
        with pytest.raises(UserError, match=r"broken\.gguf"):
            dict(weights)


@pytest.mark.parametrize("seed", range(12))
def test_bytes_of_the_header_that_changed_never_crash(
    tiny_gguf: Path, own_cache: Path, tmp_path: Path, seed: int
) -> None:
    rng, content = random.Random(seed), bytearray(tiny_gguf.read_bytes())
    first = min(tensor.data_offset for tensor in GGUFReader(tiny_gguf).tensors)
    for _ in range(3):  # the part after the tokens describes the tensors
        content[rng.randrange(4, 400) if rng.random() < 0.3 else rng.randrange(first - 1200, first)] = rng.randrange(
            256
        )
    try:
        swift = TokenSwift.from_pretrained(str(copy_of(tiny_gguf, tmp_path / "changed", content)), dtype="gguf")
        swift.generate("the cat", max_new_tokens=2)
        message = ""
    except UserError as error:
        message = str(error)
    except RuntimeError as error:  # the engine ran, on weights that make no sense
        message = str(error)
        assert "finite" in message
    assert "\n" not in message


def test_scales_that_are_not_finite_are_refused(tmp_path: Path, own_cache: Path) -> None:
    config = gguf_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, {}, "Q4_1")
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    for dtype in ("gguf", "bf16"):
        message = refused(path, dtype=dtype)
        assert "up_proj" in message and "finite" in message


def test_a_tensor_of_another_shape_or_missing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("llama", tie_word_embeddings=True), {}, "Q8_0")
    with pytest.raises(UserError, match=r"ffn_gate\.weight"):
        blocks(path, gguf_config("llama", intermediate_size=544))
    with pytest.raises(UserError, match=r"blk\.2\.attn_q\.weight"):
        blocks(path, gguf_config("llama", num_hidden_layers=3))
    with pytest.raises(UserError, match=r"output\.weight"):
        blocks(path, gguf_config("llama", tie_word_embeddings=False))
