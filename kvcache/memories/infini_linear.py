"""Infini-attention's memory without the delta rule (arXiv 2404.07143, equation 4)."""

from __future__ import annotations

from tokenswift_py.kvcache.memories.infini import Infini


class InfiniLinear(Infini):
    """Adds every page as it is, whatever is known already."""

    delta = False
    name = "infini-linear"


MEMORY = InfiniLinear
