"""Sampling parameters: each is described and checked here, once. `Options` derives what may be asked for from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tokenswift_py.sampling.kinds import Biases, Real, Texts, TokenIds, TokenLists, Tokens, Whole, Words

GREEDY_BELOW = 1e-5  # a temperature that is lower is taken for 0, as vLLM takes it: scores divided by it stay finite
CHECKPOINTS = "the checkpoint's"


@dataclass(frozen=True)
class Parameter:
    """All that is said of a sampling parameter.

    kind:    the values that it takes. help: its effect.
    unset:   meaning of an option of None; empty where the option has the parameter's own default.
    asked:   kind of the option where that is another: texts, of which a tokenizer makes ids.
    asked_default: the option's own default, where it has one.
    group:   heading of the help; python has no flag.
    """

    kind: Any
    help: str
    unset: str = ""
    asked: Any = None
    asked_default: Any = None
    group: str = "sampling"


def parameter(default: Any, kind: Any, help: str, unset: str = "", **more: Any) -> Any:
    """Makes a field of `SamplingParams` with its description."""
    described = {"parameter": Parameter(kind, help, unset, **more)}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata=described)


@dataclass(frozen=True)
class SamplingParams:
    """The parameters by which a row of logits becomes a token. They are checked when made; a wrong value is a
    `UserError`.

    A temperature below GREEDY_BELOW becomes 0. Source of `penalty`: TokenSwift section 3.4; of `typical_p`: arXiv
    2202.00666; of `top_n_sigma`: arXiv 2411.07641; of DRY and XTC: text-generation-webui#5677 and #6335, like
    llama.cpp's. sampling/reference.py says in which order they act.
    """

    temperature: float = parameter(0.0, Real(0, 100), "0 is greedy", f"{CHECKPOINTS}, else 0")
    top_k: int = parameter(0, Whole(0, unit=" (0 is off)"), "keep the k best tokens; 0 is off", CHECKPOINTS)
    top_p: float = parameter(
        1.0, Real(0, 1, off=1, above=True), "keep the best tokens of this much mass; 1 is off", CHECKPOINTS
    )
    min_p: float = parameter(0.0, Real(0, 1, off=0), "keep tokens this probable beside the best; 0 is off", CHECKPOINTS)
    penalty: float = parameter(
        1.0, Real(1, 100, off=1), "contextual penalty; 1 is off",
        "1; one that is given takes the place of the checkpoint's repetition_penalty",
    )  # fmt: skip
    penalty_window: int = parameter(1024, Whole(1), "of the latest tokens")
    dry_multiplier: float = parameter(0.0, Real(0, 1000, off=0), "DRY repetition penalty; 0 is off")
    dry_base: float = parameter(1.75, Real(1, 16), "its growth per repeated token")
    dry_length: int = parameter(2, Whole(1, 64), "longest repeat that goes unpunished")
    dry_window: int = parameter(0, Whole(0), "of so many latest tokens; 0 is the whole text")
    dry_breakers: tuple[int, ...] = parameter(
        (), TokenIds(), "no repeat is counted across these", asked=Texts(), asked_default=("\n", ":", '"', "*")
    )
    seed: int = parameter(0, Whole(0, 2**64 - 1), "of the noise", "random, and recorded")
    stream: int = parameter(
        0, Whole(0, 2**32 - 1), "number of a sample of one prompt, with noise of its own", group="python"
    )
    ban: tuple[int, ...] = parameter(
        (), TokenIds(), "token ids or one-token texts, never written", CHECKPOINTS, asked=Tokens(optional=True)
    )
    logit_bias: Mapping[int, float] = parameter(dict, Biases(), "added to a token's logit")
    repetition_penalty: float = parameter(
        1.0, Real(0, 100, off=1, above=True),
        "transformers' penalty of every token of the prompt and the text; 1 is off", CHECKPOINTS,
    )  # fmt: skip
    presence_penalty: float = parameter(
        0.0, Real(-2, 2, off=0), "taken from the logit of every token that the model wrote; 0 is off"
    )
    frequency_penalty: float = parameter(
        0.0, Real(-2, 2, off=0), "taken from it once for each time that the model wrote it; 0 is off"
    )
    no_repeat_ngram_size: int = parameter(
        0, Whole(0, unit=" (0 is off)"), "no sequence of so many tokens comes twice; 0 is off", CHECKPOINTS
    )
    ban_words: tuple[tuple[int, ...], ...] = parameter(
        (), TokenLists(), "texts never written, as the tokenizer writes them alone and after a space; or lists of ids",
        CHECKPOINTS, asked=Words(),
    )  # fmt: skip
    top_n_sigma: float = parameter(
        0.0, Real(0, 100, off=0), "keep tokens within so many standard deviations of the best logit; 0 is off"
    )
    typical_p: float = parameter(
        1.0, Real(0, 1, off=1, above=True), "keep the most typical tokens of this much mass; 1 is off", CHECKPOINTS
    )
    xtc_threshold: float = parameter(
        0.1, Real(0, 0.5), "XTC leaves out, of tokens at least this probable, all but the least probable"
    )
    xtc_probability: float = parameter(0.0, Real(0, 1, off=0), "how often it does so; 0 is off")

    def __post_init__(self) -> None:
        for name, described in described_parameters().items():
            described.kind.check(name, getattr(self, name))
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the report."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "ban": list(self.ban),
            "ban_words": [list(word) for word in self.ban_words],
            "dry_breakers": list(self.dry_breakers),
            "logit_bias": {str(k): v for k, v in self.logit_bias.items()},
        }

    @property
    def shaped(self) -> bool:
        """Returns whether more than a floor decides which tokens stay: typical_p or XTC, at a temperature."""
        return self.temperature > 0 and (self.typical_p < 1 or self.xtc_probability > 0)


def described_parameters() -> dict[str, Parameter]:
    """Returns every parameter by its name, in the order of the fields."""
    return {f.name: f.metadata["parameter"] for f in fields(SamplingParams)}
