"""The line that a round leaves in a trace."""

from __future__ import annotations

from typing import Any

from tokenswift_py.core import Acceptance, DraftTree
from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.statistics import GenerationStats
from tokenswift_py.drafters.base import Drafter
from tokenswift_py.planning.planner import Plan


def traced(
    stats: GenerationStats, history: History, tree: DraftTree, taken: Acceptance, plan: Plan, drafter: Drafter
) -> dict[str, Any]:
    """Returns the line. Its position is that of the pending token, the tree's root, its path the accepted nodes, root
    included. history: the text, with the tokens that were taken."""
    return {
        "step": stats.num_spec_steps,
        "position": len(history) - len(taken.tokens) - 1,
        "tree": {"tokens": tree.tokens.tolist(), "parents": tree.parents.tolist()},
        "path": list(taken.path),
        "tokens": list(taken.tokens),
        "ending": taken.ending,
        "ms": {phase: round(ms, 3) for phase, ms in stats.latest_ms.items() if phase != "prefill"},
        "planner": plan.explain(len(tree)),
        "drafter": {"name": drafter.name, **drafter.explain()},
    }
