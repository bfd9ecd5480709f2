"""Law 1 on hardware: what the interpreter cannot tell of the matrix units, at the sizes they are used for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tokenswift-py[triton]'")

from interpreter import INTERPRETED
from test_kernels import Scene, fill, random_tree
from test_triton import TRITON, as_if_committed
from tokenswift_py.core import Segment
from tokenswift_py.kernels.naive import Naive
from tokenswift_py.kernels.triton.matmul import linear
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (4, 128), (7, 128)])
@pytest.mark.parametrize("prefix", [1000, 8190])
def test_tree_rows_have_the_bits_of_plain_decoding(dtype: torch.dtype, group: int, head_dim: int, prefix: int) -> None:
    torch.manual_seed(0)
    pool = TorchPagePool(1, 2, head_dim, 400, dtype, torch.device("cuda"))
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    cache = KVCache(pool, 16384)
    fill(pool, cache.append(np.arange(prefix, dtype=np.int32), True))
    cache.commit(range(prefix))
    scene = Scene.of([Segment(random_tree(np.random.default_rng(0), 24), cache)], group)
    (segment,) = scene.segments
    together, _ = scene.attend(TRITON, 0, None)
    true, _ = scene.attend(Naive(), 0, None)
    torch.testing.assert_close(together, true, rtol=2e-2, atol=2e-2)
    for index in (0, 5, 23):
        alone, _ = as_if_committed(scene, segment, index).attend(TRITON, 0, None)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "depth"), [(4096, 4096), (1024, 4096), (576, 1536)])
def test_a_products_rows_are_their_own(dtype: torch.dtype, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, depth, device="cuda").to(dtype) for n in (200, columns))
    together = linear(x, weight)
    exact = x.double() @ weight.double().T
    assert ((together.double() - exact).abs().max() / exact.abs().max()) < (1e-5 if dtype == torch.float32 else 1e-2)
    for rows in (1, 16, 65):
        assert torch.equal(linear(x[:rows], weight), together[:rows])
        assert torch.equal(linear(x[-rows:], weight), together[-rows:])
