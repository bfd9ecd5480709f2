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
    seed=st.integers(0, 2**64 - 1),
)
