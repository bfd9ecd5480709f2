"""A prompt, and the kinds of sampling that hypothesis may draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tokenswift_py.core import SamplingParams

PROMPT = [int(t) for t in np.random.default_rng(2).integers(0, 61, 50)]
samplers = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 20]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty=st.sampled_from([1.0, 1.2]),
    penalty_window=st.sampled_from([8, 1024]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_breakers=st.sampled_from([(), (3, 4)]),
    dry_window=st.sampled_from([0, 0, 12]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.1, 0.95]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.2]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 3]),
    ban_words=st.sampled_from([(), ((5, 9), (7, 7, 7))]),
    top_n_sigma=st.sampled_from([0.0, 0.0, 2.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.9]),
    xtc_threshold=st.sampled_from([0.05, 0.2]),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)
