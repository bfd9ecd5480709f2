"""Random JSON schemas whose texts are of bounded length, numbers aside."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("name", "the cat", "a", "on", "größe", "b_2", "x y", "mat")
LEAVES = ("integer", "number", "string", "pattern", "boolean", "null", "enum", "const", "format")
VALUES: tuple[Any, ...] = ("cat", "the dog", "", 'a "b"', 3, -1.5, True, None, [], ["the", 1], {"on": 2})


def random_schema(rng: np.random.Generator, depth: int = 3) -> dict[str, Any]:
    """Makes objects and arrays down to `depth`, unions, and every kind of leaf."""
    kinds = (*LEAVES, *(("object", "array", "anyOf") * 3 if depth else ()))
    kind = str(rng.choice(kinds))
    if kind == "object":
        names = [str(name) for name in rng.permutation(NAMES)[: rng.integers(0, 5)]]
        needed = [name for name in names if rng.random() < 0.6]
        inside = {name: random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": inside, "required": needed, "additionalProperties": False}
    if kind == "array":
        least = int(rng.integers(0, 3))
        most = least + int(rng.integers(0, 3))
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least, "maxItems": most}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.integers(1, 4))]}
    return random_leaf(rng, kind)


def random_leaf(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    if kind == "integer":
        least = int(rng.integers(-1000, 1000))
        return {"type": "integer", "minimum": least, "maximum": least + int(rng.integers(0, 500))}
    if kind == "number":
        return {"type": "number", "minimum": 0, "exclusiveMaximum": int(rng.integers(1, 100))}
    if kind == "string":
        least = int(rng.integers(0, 4))
        return {"type": "string", "minLength": least, "maxLength": least + int(rng.integers(0, 9))}
    if kind == "pattern":
        return {"type": "string", "pattern": str(rng.choice(["^[a-c]{2,5}$", "^(the|cat) [0-9]+x$", "^\\d{3}-[A-Z]$"]))}
    if kind == "format":
        return {"type": "string", "format": str(rng.choice(["date", "ipv4", "uuid"]))}
    if kind == "enum":
        return {"enum": [VALUES[i] for i in rng.permutation(len(VALUES))[: rng.integers(1, 5)]]}
    if kind == "const":
        return {"const": VALUES[rng.integers(len(VALUES))]}
    return {"type": kind}
