"""Every kind of checkpoint loads; every broken one is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGUFWriter
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gguf_writer
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.checkpoints import finding
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.memory import cgroup_room
from tokenswift_py.models.rope import rope_tables


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(model: Path | str) -> str:
    with pytest.raises(UserError) as error:
        TokenSwift.from_pretrained(str(model), dtype="fp32")
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_sharded_folder_with_its_generation_defaults(tiny_folder: Path) -> None:
    assert len(list(tiny_folder.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(tiny_folder))
    assert checkpoint.defaults == {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    assert checkpoint.eos == (2, 0)
    weights = checkpoint.tensors().to(torch.bfloat16, torch.device("cpu"))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == checkpoint.spec.shapes()
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_parameters_count_every_tensor(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    tensors = checkpoint.tensors()
    assert checkpoint.spec.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_a_name_that_is_nothing() -> None:
    assert "hub id" in refused("no such model")
    assert "existing .gguf" in refused("missing.gguf")


def test_an_unsupported_family(copy: Path) -> None:
    edit(copy, model_type="gpt2")
    families = "gemma2, gemma3_text, llama, mistral, mixtral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, smollm3"
    assert families in refused(copy)


def test_longrope_in_config_json_is_that_of_transformers(copy: Path) -> None:
    """The original length stands outside, as in Phi-3's config. Texts are short and long ones."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 9.0]}
    edit(copy, rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "longrope", **factors},
         original_max_position_embeddings=64)  # fmt: skip
    swift = TokenSwift.from_pretrained(str(copy), dtype="fp32", engine="torch")
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    for count in (64, 100):
        tokens = np.random.default_rng(0).integers(0, 250, count)
        with torch.inference_mode():
            expected = model(torch.from_numpy(tokens)[None]).logits[0]
        decoder = swift.executor.model(rope_tables(swift.checkpoint.config, count))
        logits = decoder.forward([Segment(DraftTree.chain(tokens), decoder.new_cache(), causal=True)]).logits
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy)


def test_a_shard_that_is_missing(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(copy)


def test_a_shard_that_was_cut(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused(copy)


def test_a_tensor_of_another_shape(copy: Path) -> None:
    edit(copy, intermediate_size=96)
    assert "mlp" in refused(copy)


def test_pickles_are_not_read(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickles" in refused(copy)


def test_an_index_that_points_elsewhere(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    assert "plain file names" in refused(copy)


def test_a_missing_tokenizer(copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refused(copy)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"not a model at all"])
def test_a_broken_gguf(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(content)
    assert "broken.gguf" in refused(tmp_path / "broken.gguf")
    assert not list(tmp_path.glob("cache/*"))


def test_a_gguf_of_another_family(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "bloom" in refused(tmp_path / "other.gguf")


def test_a_default_model_that_was_tampered_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wrong.gguf").write_bytes(b"GGUF and something else")
    monkeypatch.setattr(finding, "default_gguf", lambda scratch: tmp_path / "wrong.gguf")
    assert "SHA-256" in refused("smollm2-135m")


def test_weights_that_cannot_fit_are_refused_before_they_are_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 300 * 2**20)
    edit(copy, intermediate_size=10_000_000)
    message = refused(copy)
    assert message.startswith("memory:")
    assert "300 MiB" in message


def test_a_hub_id_is_fetched_without_pickles_or_code(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **settings: Any) -> str:
        asked.update(repo=repo, **settings)
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("some-owner/some-model", revision="main")
    assert checkpoint.folder == tiny_folder
    assert (asked["repo"], asked["revision"]) == ("some-owner/some-model", "main")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tekken.json", "consolidated.safetensors", "model.bin",
        "consolidated-00001-of-00002.safetensors", "onnx/config.json", "original/consolidated.00.pth",
    ]  # fmt: skip
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:3]


def test_a_revision_is_a_hubs(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"revision: 'v2' is not allowed; of a hub id only; .* is not read from a hub"):
        open_checkpoint(str(tiny_folder), "v2")


def test_what_was_fetched_is_used_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever error the library that speaks HTTP has for it."""
    (tmp_path / "model.Q8_0.gguf").write_bytes(b"GGUF")

    def unreachable(*_: Any, **__: Any) -> list[str]:
        raise type("ConnectError", (Exception,), {})("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert finding.from_hub("owner/name:Q8_0", None) == tmp_path / "model.Q8_0.gguf"


def test_an_installed_default_model_needs_no_place_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("where nothing can be written")
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(finding, "installed_default", lambda: tmp_path / "default.gguf")
    monkeypatch.setattr(finding, "checked_default", lambda path: path)
    assert finding.kept_default_gguf() == tmp_path / "default.gguf"


def test_what_is_made_of_a_gguf_file_is_for_all_who_share_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    path = gguf_writer.write_gguf(tmp_path / "tiny.gguf", gguf_writer.gguf_config("llama"), {})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    folder = open_checkpoint(str(path)).folder
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **settings: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "some-owner/some-model" in refused("some-owner/some-model")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["z", "z"]]}}', "tokenizer"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_broken_side_files(copy: Path, file: str, content: str, says: str) -> None:
    (copy / file).write_text(content)
    assert says in refused(copy)


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_words_are_cut_as_tokenizer_json_says(copy: Path, named: str) -> None:
    """Whatever class tokenizer_config.json names. Some of transformers' classes have a rule of their own."""
    texts = ["one\n\n1. two\n\n2. three   100 000\n" * 20]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), bytes_]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(copy / "tokenizer.json"))
    own = {"tokenizer_class": named, "eos_token": "<end>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(own))
    found = open_checkpoint(str(copy)).tokenizer()
    assert found(texts[0]).input_ids == tokenizer.encode(texts[0]).ids
    assert found.decode(found(texts[0]).input_ids) == texts[0]
    assert found.eos_token_id == tokenizer.token_to_id("<end>")


def test_a_model_of_text_and_images_is_refused_with_the_way_to_read_it(copy: Path) -> None:
    edit(copy, model_type="mistral3", text_config={"model_type": "mistral"})
    assert "of a model of text and images only the .gguf file is read" in refused(copy)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": "three"}, {"num_attention_heads": 0}])
def test_a_config_of_nonsense(copy: Path, changes: dict[str, Any]) -> None:
    edit(copy, **changes)
    assert "config.json" in refused(copy)


def test_quantised_weights_are_refused(copy: Path) -> None:
    edit(copy, quantization_config={"quant_method": "fp8"})
    assert "quantization_config" in refused(copy)


def test_weights_of_another_type_are_refused(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    assert "F8_E4M3" in refused(copy)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8", "gguf"])
def test_a_gguf_that_cannot_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("TOKENSWIFT_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("tokenswift_py.kernels.cpu._native", reason="the C++ engine is not built")
    path = gguf_writer.write_gguf(tmp_path / "large.gguf", gguf_writer.gguf_config("llama"), {}, "Q8_0")
    monkeypatch.setattr("tokenswift_py.memory.free_memory", lambda: 2**20)
    monkeypatch.setattr("tokenswift_py.checkpoints.gguf_tensors.GgufIndex.bytes_of", None)
    with pytest.raises(UserError, match=f"^memory: .* the weights of .* in {dtype}"):
        TokenSwift.from_pretrained(str(path), dtype=dtype, engine="native")


# Which tensors of which files are the model's


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards, which are removed, and their index with them."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    return tensors


def others(folder: Path) -> dict[str, torch.Tensor]:
    """Makes other tensors of the same names and shapes."""
    return {name: tensor + 1 for name, tensor in open_checkpoint(str(folder)).tensors().items()}


def read_as_transformers_does(folder: Path) -> bool:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    tensors = open_checkpoint(str(folder)).tensors()
    return all(torch.equal(tensor.float(), theirs[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", [f"{stem}.safetensors" for stem in ("a", "zzz", "consolidated", "adapter_model")])
@pytest.mark.parametrize("sharded", [True, False])
def test_files_beside_the_model_are_not_read(
    copy: Path, name: str, sharded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where their names sort first nor last; they are named in one line of the log."""
    same = others(copy)
    if not sharded:
        save_file(whole(copy), copy / "model.safetensors", metadata={"format": "pt"})
    save_file(same, copy / name, metadata={"format": "pt"})
    assert read_as_transformers_does(copy)
    caplog.clear()
    open_checkpoint(str(copy))
    assert [record.message for record in caplog.records] == [f"copy: not read: {name}"]


def test_model_safetensors_goes_before_the_index(copy: Path) -> None:
    save_file(others(copy), copy / "model.safetensors", metadata={"format": "pt"})
    assert read_as_transformers_does(copy)


def test_a_tensor_in_two_files_is_refused_with_both(copy: Path) -> None:
    """Where neither an index nor the name says which is the model."""
    tensors = whole(copy)
    for name in ("one.safetensors", "two.safetensors"):
        save_file(tensors, copy / name, metadata={"format": "pt"})
    message = refused(copy)
    assert "it is in one.safetensors and in two.safetensors" in message
    (copy / "two.safetensors").unlink()
    assert open_checkpoint(str(copy)).tensors()["model.norm.weight"].equal(tensors["model.norm.weight"])


def more(folder: Path, **tensors: torch.Tensor) -> None:
    save_file({**whole(folder), **tensors}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_that_would_change_the_text_is_refused(copy: Path, name: str) -> None:
    more(copy, **{name: torch.ones(48)})
    assert f"model: tensor: '{name}' is not allowed; no model of this config reads it" in refused(copy)


def test_a_tensor_that_changes_nothing_is_let_pass(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    more(copy, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(48),
                  "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # fmt: skip
    caplog.clear()
    open_checkpoint(str(copy))
    assert not caplog.records
    more(copy, **{"v_head.weight": torch.ones(48), "vision.weight": torch.ones(48)})
    open_checkpoint(str(copy))
    (record,) = caplog.records
    assert record.message == "copy: not read: tensor v_head.weight, tensor vision.weight"


def test_an_lm_head_beside_tied_embeddings_must_be_the_same(copy: Path) -> None:
    """transformers then leaves them untied; what the config says and what the file holds must agree here."""
    edit(copy, tie_word_embeddings=True)
    tensors = whole(copy)
    for head, differs in ((tensors["model.embed_tokens.weight"].clone(), False), (tensors["lm_head.weight"], True)):
        save_file({**tensors, "lm_head.weight": head}, copy / "model.safetensors", metadata={"format": "pt"})
        if differs:
            assert "'lm_head.weight' is not allowed" in refused(copy)
        else:
            assert read_as_transformers_does(copy)


def test_the_memory_of_control_groups(tmp_path: Path) -> None:
    """Version 2 with a limit above the process's own group, and version 1."""
    own = tmp_path / "own"
    for folder, files in {
        "two/app/run": {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 0"},
        "two/app": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 200"},
        "one/memory/job": {
            "memory.limit_in_bytes": "900",
            "memory.usage_in_bytes": "100",
            "memory.stat": "total_inactive_file 50",
        },
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
    own.write_text("0::/app/run\n")
    assert list(cgroup_room(tmp_path / "two", own)) == [500]
    own.write_text("4:memory:/job\n3:cpu:/job\n")
    assert list(cgroup_room(tmp_path / "one", own)) == [850]
    assert list(cgroup_room(tmp_path / "two", tmp_path / "missing")) == []
