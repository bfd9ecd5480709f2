"""The settings of `tokenswift extend-context` in one table, from which its flags, checks and help follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tokenswift_py.errors import check
from tokenswift_py.models.positions import STRETCHES
from tokenswift_py.sampling.kinds import Choice, Named, Real, Text, Texts, Whole, is_whole

SCHEDULES = ("constant", "progressive", "mixed")
LEARN = ("lora+", "lora", "full")
BUILT_IN = ("code", "prose")  # of human.py; docs are too few to be both read by experiments and learned from


@dataclass(frozen=True)
class Lengths:
    """Rising numbers of tokens, or None. On the command line they stand with commas between them."""

    def check(self, name: str, value: Any) -> None:
        fine = value is None or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_whole, value)))
        check(fine, name, value, "whole numbers with commas between them")
        rising = value is None or (value[0] >= 2 and list(value) == sorted(set(value)))
        check(rising, name, value, "lengths from 2 on, each above the one before")


@dataclass(frozen=True)
class Flag:
    """The description of a setting.

    kind:  the values that it takes.
    help:  its effect, without its default.
    unset: the meaning of the default if that is None.
    again: whether a resumed run may be given another value.
    """

    kind: Any
    help: str
    unset: str = ""
    again: bool = False


def flag(default: Any, kind: Any, help: str, unset: str = "", again: bool = False) -> Any:
    """Returns a field of `Settings` with its description."""
    return field(default=default, metadata={"flag": Flag(kind, help, unset, again)})


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. Every wrong value is a `UserError`."""

    context: int = flag(16384, Whole(64, 2**24), "tokens that the model is to reach")
    positions: str = flag("yarn", Choice(STRETCHES), "linear, ntk or yarn: how the frequencies are stretched to it")
    model: str = flag("smollm2-135m", Named("a model"), "smollm2-135m, a folder, a .gguf file or a hub id")
    revision: str | None = flag(None, Text(), "of a hub id", "the newest")
    texts: tuple[str, ...] = flag((), Texts(), "UTF-8 files to learn from, a document each", "built-in code and prose")
    attention: str = flag(
        "auto", Choice(("auto", "s2", "full")),
        "s2 (LongLoRA's shifted groups) or full, while training; auto is full for skipped positions, else s2",
    )  # fmt: skip
    group: int | None = flag(None, Whole(2, optional=True), "tokens of a group of s2", "a quarter of the length")
    full_steps: int = flag(0, Whole(0), "the last so many steps have full attention, and whole texts")
    window: int | None = flag(
        None, Whole(8, optional=True), "skipped positions (PoSE): tokens of a text that stands for a longer one",
        "whole texts",
    )  # fmt: skip
    chunks: int = flag(2, Whole(2, 64), "pieces of such a text, each of which may skip positions")
    schedule: str = flag(
        "constant", Choice(SCHEDULES),
        "constant (the context), progressive (lengths in turn, in equal shares) or mixed (one drawn for each step)",
    )  # fmt: skip
    lengths: tuple[int, ...] | None = flag(
        None, Lengths(), "of a progressive or mixed schedule", "doublings from the trained length to the context"
    )
    steps: int = flag(100, Whole(1, 10**7), "steps of the optimiser")
    batch_tokens: int | None = flag(
        None, Whole(1, optional=True), "tokens of a step, text after text (gradients add up)", "the context"
    )
    rate: float = flag(2e-4, Real(0, 1, above=True), "peak learning rate")
    warmup: int = flag(20, Whole(0), "steps in which the rate rises, at most half; then it falls to a tenth")
    rank: int = flag(8, Whole(1, 4096), "of LoRA's matrices beside each projection of attention")
    alpha: int = flag(16, Whole(1, 10**6), "of LoRA: what it adds is multiplied by alpha / rank")
    learn: str = flag(
        "lora+", Choice(LEARN), "lora (beside attention), lora+ (embeddings and norms too) or full (every weight)"
    )
    held_out: int = flag(1, Whole(0, 1000), "texts as long as the context, of each source, read before and after")
    dtype: str = flag(
        "auto",
        Choice(("auto", "fp32", "bf16")),
        "of products, and of weights that do not learn; auto is bf16 where fast",
    )
    save_dtype: str = flag("bf16", Choice(("fp32", "bf16")), "of the merged weights")
    device: str = flag("auto", Named("a device"), "auto, cpu, cuda, ...")
    seed: int = flag(0, Whole(0), "of LoRA's first matrices and of what is drawn")
    threads: int | None = flag(None, Whole(1, 1024, optional=True), "CPU threads", "torch's choice", again=True)
    save_every: int = flag(25, Whole(1), "steps from one saved state to the next", again=True)
    minutes: float | None = flag(
        None, Real(0, 1e6, above=True), "end training by then, with what there is; --resume goes on", "none", again=True
    )

    def __post_init__(self) -> None:
        for name, described in described_settings().items():
            value = getattr(self, name)
            if value is not None or described.unset == "":
                described.kind.check(name, value)
        known = None if self.lengths is None else self.lengths[-1]
        check(self.lengths is None or self.schedule != "constant", "lengths", self.lengths, "not of schedule constant")
        check(known is None or known <= self.context, "lengths", known, f"at most the context ({self.context})")
        check(self.group is None or self.chosen_attention == "s2", "group", self.group, "only with attention s2")
        check(self.full_steps <= self.steps, "full_steps", self.full_steps, f"at most the steps ({self.steps})")
        if self.window is not None:
            check(self.window < self.context, "window", self.window, f"below the context ({self.context})")
            check(self.chunks <= self.window, "chunks", self.chunks, f"at most the window ({self.window})")

    @property
    def chosen_attention(self) -> str:
        """The attention that auto stands for, or the one that was asked for."""
        if self.attention != "auto":
            return self.attention
        return "full" if self.window else "s2"

    def plain(self) -> dict[str, Any]:
        """Returns the settings as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def described_settings() -> dict[str, Flag]:
    """Returns the description of every setting by its name, in the order of the fields."""
    return {f.name: f.metadata["flag"] for f in fields(Settings)}


def settings_of(plain: dict[str, Any]) -> Settings:
    """Returns the settings that `plain` gave. Raises UserError for unknown names and wrong values."""
    known = described_settings()
    for name in plain:
        check(name in known, "settings", name, f"known are {', '.join(known)}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Settings(**given)
