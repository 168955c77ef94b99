"""What passes between stages: plain data, with no model, process group or file behind it.

Shapes: N gradient rows, D width of a KV site, R rank of its subspace.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:  # the config is read without torch
    from torch import Tensor

Kind = Literal["key", "value"]

R = TypeVar("R")

ADDED_LATER = {"added_later": True}
"""The metadata of a field that files written before it was added lack: there it has its default."""

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What JSON and YAML can hold; settings of users, whose keys are not ours, are of this type."""


@dataclass(frozen=True, order=True)
class KVSite:
    """A place where the method acts: the keys or the values that one layer's linear module puts out."""

    layer: int
    kind: Kind
    module: str
    """Dotted name of the linear module, as in `model.get_submodule`."""
    columns: tuple[tuple[int, int], ...]
    """Half-open ranges of the module's output features, head after head: ((0, width),) unless the module is fused."""
    num_heads: int = 1
    """KV heads, that the width is divided into."""

    @property
    def width(self) -> int:
        """Number of features: KV heads times head width."""
        return sum(stop - start for start, stop in self.columns)

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class SupervisedExample:
    """A calibration example as the policy sees it, and the tokens that define its correctness."""

    id: str
    tokens: tuple[int, ...]
    """Cut after the last supervised token: what follows has exactly zero gradient."""
    targets: tuple[int, ...]
    """Positions of the supervised tokens in `tokens`, each >= 1: the token before it predicts it."""
    num_tokens_after: int = 0
    """Tokens that were cut off behind the last target: zero rows, that only centring counts."""


@dataclass(frozen=True)
class GradientBatch:
    """The gradient rows of one micro-batch, all of one logical shard."""

    shard: int
    grad_ND: Mapping[KVSite, Tensor]
    """The loss gradient at each site's output, one row a token position, in the dtype of the model."""
    num_zero_rows: int = 0
    """Positions after the last supervised token: their gradients are exactly zero, so they are counted and not held."""
    num_tokens: int = 0
    num_examples: int = 0


def record_of(kind: type[R], fields: Mapping[str, Any]) -> R:
    """A dataclass or NamedTuple from the fields that a JSON object, or a section of YAML, holds."""
    return kind(**fields)


@dataclass(frozen=True)
class Certificate:
    """What is known for sure of a sketch against the rows it saw. Every field is a sum, so certificates add up."""

    energy: float = 0.0
    """||G||_F^2 of all rows."""
    delta: float = 0.0
    """Sum of all shrinkages: 0 <= G'G - B'B <= delta * I."""
    lost_energy: float = 0.0
    """||G||_F^2 - ||B||_F^2, summed shrink by shrink."""
    num_rows: int = 0
    num_shrinks: int = 0
    num_dropped_rows: int = 0

    def __add__(self, other: Certificate) -> Certificate:
        return Certificate(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class SiteMoments:
    """A site's second moment over every rank's rows, as far as its sketches hold it."""

    gram_DD: Tensor
    """G'G (or B'B of the sketches), float64, uncentred."""
    sum_D: Tensor
    """Sum of the rows, float64: centring is decided after the reduction."""
    certificate: Certificate


@dataclass(frozen=True)
class SiteSubspace:
    """The directions that one site's keys or values may keep."""

    basis_DR: Tensor
    """Orthonormal columns, strongest first, float32, on the CPU."""
    eigenvalue_D: Tensor
    """Spectrum of the second moment, strongest first, float64: the squared singular values of the gradient rows."""
    energy_fraction: float
    """Share of the spectrum's sum that the basis holds, in [0, 1]."""
    certificate: Certificate
    num_null_directions: int = 0
    """Basis directions beyond the numerical rank of the gradients: they are arbitrary, but the same in every run."""


@dataclass(frozen=True)
class Subspace:
    """The capability subspace: what `project/subspace.safetensors` holds."""

    sites: Mapping[KVSite, SiteSubspace]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Base model and its weights' fingerprint, insertion point, rank rule, hashes of the inputs."""


@dataclass(frozen=True)
class SiteOperator:
    """A symmetric D x D map of a site's output: z -> keep * z + z (factor_DR * weight_R) factor_DR'.

    hard: keep 0, the basis, weights 1. Its cheaper twin where few directions go: keep 1, the removed directions,
    weights -1. blend: keep rho, weights 1 - rho. identity: keep 1 and no column.
    """

    keep: float
    factor_DR: Tensor
    """Orthonormal columns, float32; R may be 0."""
    weight_R: Tensor


@dataclass(frozen=True)
class Projection:
    """What generation applies: an operator a site, and where it acts."""

    operators: Mapping[KVSite, SiteOperator]
    insertion: Literal["linear", "rope", "head"] = "linear"
    """Where z is taken; factors are of the site's whole width, KV head after KV head, in every case.

    `linear`: the linear module's output. `rope`: keys after RoPE, values as `linear`. `head`: as `linear`, by an
    operator that mixes no two KV heads: each column of its factor is zero outside one head's rows (block diagonal).
    """


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy sees it."""

    id: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ThoughtBudget:
    """How long a completion may think; then the mark that ends a thought is written for it."""

    num_tokens: int
    """Of the completion; a thought that is open behind them is closed."""
    open_token: int
    close_token: int

    def is_open(self, tokens: Sequence[int], *, before: bool = False) -> bool:
        """Whether a thought is open behind `tokens`, if one was `before` them or not."""
        marks = [token for token in tokens if token in (self.open_token, self.close_token)]
        return marks[-1] == self.open_token if marks else before


@dataclass(frozen=True)
class Completion:
    """A line of `generate/completions/*.jsonl`: what the policy answered to one prompt, unfiltered."""

    id: str
    """The prompt's id."""
    sample: int
    seed: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """The generated tokens, with the end-of-sequence token if there was one."""
    text: str
    finish_reason: Literal["stop", "length"]
    """`stop`: the policy ended by itself. `length`: it was cut at `max_new_tokens`."""


@dataclass(frozen=True)
class Answer:
    """A line of `evaluate/ARM/TASK.jsonl`: what an arm answered to one held-out example, and how it was judged."""

    id: str
    output: str
    extracted: str | None
    """What was taken as the answer: the strict extraction, else the lenient one."""
    gold: str
    correct: bool
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    strict: str | None
    """What the output gives in the form that the prompt asks for."""
    lenient: str | None
    """What could be taken from anywhere in the output."""
    strict_correct: bool
    lenient_correct: bool
    is_repetitive: bool
    nll: float | None = None
    """Mean negative log-likelihood of the reference answer's tokens, for tasks that are measured by it."""
    sample: int = 0
    """Which of the arm's answers to the example, from 0."""
    reason: str = ""
    """Why it is right or wrong: `right`, `other value`, `no answer`, `unfinished`; of programs `failed`, `time`, ..."""
    vote: str | None = None
    """What was extracted in one spelling: answers of one vote are the same answer."""
    entropy: float | None = None
    """Nats a token, of what the model gave every token at temperature 1; None where its engine measures none."""
    judged_by: str = field(default="", compare=False, metadata=ADDED_LATER)
    """Version and digest of the code that judged it."""


@dataclass(frozen=True)
class TokenEffects:
    """A line of `token_effects/ARM.jsonl`: what the projection changes at each token of a completion."""

    id: str
    """The prompt's id."""
    sample: int
    pieces: tuple[str, ...]
    """The text of each token, special ones too; a letter of several tokens stands at the last of them."""
    base_nll: tuple[float, ...]
    """Negative log-likelihood of each token under the untouched policy, nats; in thousandths."""
    projected_nll: tuple[float, ...]
    """The same under the projected one."""


@dataclass(frozen=True)
class Leak:
    """Two rows with the same problem, and how alike they are."""

    id: str
    other_id: str
    similarity: float
    """1.0: the same words."""


@dataclass(frozen=True)
class LeakReport:
    """What two splits share."""

    split: str
    other: str
    num_rows: int
    num_exact: int
    """Rows of `split` whose problem stands in `other` word for word."""
    num_near: int
    """Further rows that nearly do."""
    leaks: tuple[Leak, ...]
    """For each such row, the row of `other` that is most like it."""

    def __str__(self) -> str:
        shared = f"{self.num_exact} exact and {self.num_near} near duplicates"
        return f"{self.split} against {self.other}: {shared} in {self.num_rows} rows"
