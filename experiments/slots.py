"""Texts that llama.cpp writes at once, a row of each in every pass, as its server does in its slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

N_BATCH = 2048  # the rows of a call, as many as its server allows
NO_DRAFTS = "the library drafts for one sequence only; for several slots, its server does"


class Slots:
    """llama.cpp with several sequences that go on from cuts of one prefix, on a GGUF, with f16 KV and flash attention.

    path:     the .gguf file.
    tokens:   the prefix. cuts: the number of its tokens that stand before each text.
    rest:     the number of last rows of each prompt that `write` reads. Those before them are read here once, for all.
    new:      the number of tokens of each text, whatever they are.
    sampling: temperature and min_p.
    unified:  whether all sequences share one buffer of keys and values, in which equal prefixes are kept once, or each
              has its own. llama.cpp's server has both.
    Raises RuntimeError where llama.cpp fails.
    """

    def __init__(
        self,
        path: Path,
        tokens: Sequence[int],
        cuts: Sequence[int],
        rest: int,
        new: int,
        *,
        sampling: tuple[float, float] = (0.0, 0.0),
        threads: int,
        unified: bool,
    ):
        import llama_cpp as library
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self._library, self._tokens, self._cuts, self._rest, self._new = library, tokens, cuts, rest, new
        self._sampling, count, longest = sampling, len(cuts), max(cuts)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        shared, own = longest + count * (rest + new), count * (-(-(longest + new) // 256) * 256)
        settings = {
            "n_ctx": shared if unified else own, "n_batch": max(N_BATCH, count * rest), "n_seq_max": count,
            "n_threads": threads, "n_threads_batch": threads, "kv_unified": unified,
            "flash_attn_type": library.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "rope_scaling_type": library.LLAMA_ROPE_SCALING_TYPE_NONE,
        }  # fmt: skip
        params = library.llama_context_default_params()
        for name, value in settings.items():
            setattr(params, name, value)
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            library.llama_model_free(self._model)
            raise RuntimeError(f"llama.cpp makes no context of {settings['n_ctx']} tokens for {count} sequences")
        self._batch = library.llama_batch_init(settings["n_batch"], 0, 1)
        self._memory = library.llama_get_memory(self._context)
        for start in range(0, longest - rest, N_BATCH):
            stop = min(start + N_BATCH, longest - rest)
            self._decode([(tokens[position], position, 0, False) for position in range(start, stop)])
        for sequence in range(1, count):
            library.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def write(self) -> tuple[list[tuple[float, list[int]]], list[list[int]]]:
        """Writes all texts.

        Returns marks and the texts. The marks are the time in seconds and the number of tokens of each text, before the
        first pass and after each. The same is written each time.
        """
        library, texts = self._library, [list[int]() for _ in self._cuts]
        for sequence, cut in enumerate(self._cuts):
            library.llama_memory_seq_rm(self._memory, sequence, cut - self._rest, -1)
        samplers = [self._sampler(seed) for seed in range(len(texts))]
        rows = [
            (self._tokens[position], position, sequence, position == cut - 1)
            for sequence, cut in enumerate(self._cuts)
            for position in range(cut - self._rest, cut)
        ]
        marks = [(perf_counter(), [0] * len(texts))]
        while len(texts[0]) < self._new:
            self._decode(rows)
            for place, (*_, sequence, wanted) in enumerate(rows):
                if wanted:
                    found = library.llama_sampler_sample(samplers[sequence], self._context, place)
                    texts[sequence].append(found)
            marks.append((perf_counter(), list(map(len, texts))))
            rows = [
                (text[-1], cut + len(text) - 1, sequence, True)
                for sequence, (text, cut) in enumerate(zip(texts, self._cuts, strict=True))
            ]
        for sampler in samplers:
            library.llama_sampler_free(sampler)
        return marks, texts

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _sampler(self, seed: int) -> Any:
        """Makes a text's own sampler, in llama.cpp's order: min-p, then temperature."""
        library, (temperature, min_p) = self._library, self._sampling
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        if temperature == 0:
            parts = [library.llama_sampler_init_greedy()]
        else:
            parts = [
                library.llama_sampler_init_min_p(min_p, 1),
                library.llama_sampler_init_temp(temperature),
                library.llama_sampler_init_dist(seed),
            ]
        for part in parts:
            library.llama_sampler_chain_add(chain, part)
        return chain

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Computes rows. Each is a token, its position, its sequence, and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.logits[place] = 1, wanted
            batch.seq_id[place][0] = sequence
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode of {len(rows)} rows returned {code}")
