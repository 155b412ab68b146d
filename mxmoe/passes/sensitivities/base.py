"""What a sensitivity is: a frozen dataclass whose fields are its options, and what it sees of every bank."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe.calib import BankStats, Stats
from mxmoe.errors import BadOption, MissingInput
from mxmoe.ir import Scheme
from mxmoe.passes.options import Optioned

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SeenBank:
    """One bank of a block: its sizes, the schemes to choose from, and what was observed of it."""

    block: str
    name: str
    """routed or shared."""
    sizes: Mapping[str, tuple[int, int]]
    """Role -> (n, k) of its weights."""
    schemes: tuple[Scheme, ...]
    """The columns of every table."""
    stats: Stats
    sums: BankStats

    @property
    def experts(self) -> int:
        """Number of experts, the rows of every table."""
        return self.sums.experts

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of its linears, in order."""
        return tuple(self.sizes)

    @property
    def frequency(self) -> Floats:
        """[expert], mean number of assignments per token."""
        return self.sums.tokens / self.sums.n_tokens

    @property
    def mass(self) -> Floats:
        """[expert], mean router weight per token."""
        return self.sums.mass / self.sums.n_tokens

    def numel(self, role: str) -> int:
        """Weights of one expert's linear."""
        n, k = self.sizes[role]
        return n * k

    def squared(self, role: str) -> Floats:
        """[expert, scheme], squared change of the output over all tokens when only this linear is quantized."""
        return self.stats.sensitivity(self.block, self.name, role, self.schemes)

    @property
    def output(self) -> Floats:
        """[expert], squared norm of its weighted output over all tokens; of one that nobody saw its bank's mean."""
        return self.sums.output(max(self.stats.min_tokens, 1))

    def fisher(self, role: str) -> Floats:
        """
        [expert, scheme], the same with every channel times the loss's gradient there, before it is squared.

        Raises:
            MissingInput: no loss was differentiated.
        """
        if role not in self.sums.fisher_error:
            way = "observe the model with gradients=True"
            raise MissingInput(name="annotate-sensitivity", what="errors weighed by a loss's gradient", way=way)
        return self.sums.fisher(role, self.stats.min_tokens)[:, self.stats.columns(self.schemes)]

    def fact(self, fact: str, role: str) -> Floats:
        """
        [expert], what the weights of a role say by themselves; role `router` stands for the router's rows.

        Raises:
            MissingInput: nobody looked.
        """
        found = self.sums.facts.get(fact, {})
        if role not in found:
            what = f"{fact} of {self.block} {self.name} {role}"
            way = f"observe with facts=({fact!r},), or take a method that does without"
            raise MissingInput(name="annotate-sensitivity", what=what, way=way)
        return found[role]


@dataclass(frozen=True)
class Sensitivity(Optioned):
    """
    A way to say what each scheme of each linear costs in accuracy.

    A subclass is a frozen dataclass with a class variable `name` (as in the table) and implements `losses`. Its fields
    are its options: int, float, bool, str, tuples of these, or optional, with defaults. Losses are not negative, `inf`
    is impossible, and what they sum to is minimised: only their ratios count.
    """

    @property
    def needs_gradients(self) -> bool:
        """Whether `SeenBank.fisher` is asked for, so that the model must be observed with gradients."""
        return False

    @property
    def needs_facts(self) -> tuple[str, ...]:
        """Facts of weights that are asked for."""
        return ()

    @abstractmethod
    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Give for each bank role -> [expert, scheme]."""

    def gone(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """
        Give for each bank [expert], what it costs to have the expert put out nothing, in the unit of `losses`.

        Raises:
            BadOption: the method does not say.
        """
        del banks
        reason = "it does not say what an expert without bits costs; squared, mxmoe and fisher do"
        raise BadOption(name=self.name, option="the candidate w0", reason=reason)


@dataclass(frozen=True)
class ByScore(Sensitivity):
    """
    A sensitivity that has one number for each expert, and leaves open what a scheme does to it.

    The loss is score x size x `distortion`: the score says how much an expert matters for each of its weights, size is
    the linear's part of the largest one, and the distortion is how much a scheme loses on average over the model. With
    equal scores the best plan is the uniform one, where the budget is what a scheme costs and no mix of a narrower and
    a wider one distorts less for the same bits.
    """

    @abstractmethod
    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Give for each bank [expert], not negative; more is more worth protecting."""

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Spread the scores over roles and schemes."""
        curve, largest = distortion(banks), largest_of(banks)
        scored = zip(banks, self.scores(banks), strict=True)
        return [
            {role: np.outer(score, curve) * (bank.numel(role) / largest) for role in bank.roles}
            for bank, score in scored
        ]


def distortion(banks: Sequence[SeenBank]) -> Floats:
    """
    [scheme], squared error in parts of the squared output, on average over all linears of all banks.

    Of each bank and role the errors of all experts are summed, and so are their outputs.
    """
    parts: list[Floats] = []
    for bank in banks:
        output = float(bank.sums.squared_output.sum())
        if output > 0:
            parts += [bank.squared(role).sum(axis=0) / output for role in bank.roles]
    return np.mean(parts, axis=0) if parts else np.zeros(len(banks[0].schemes) if banks else 0)


def largest_of(banks: Sequence[SeenBank]) -> int:
    """Count the weights of the largest linear of one expert."""
    return max((bank.numel(role) for bank in banks for role in bank.roles), default=1)


def with_shared(banks: Sequence[SeenBank], routed: Mapping[str, Floats]) -> list[Floats]:
    """
    Complete scores of routed experts, block -> [expert], for methods whose sources leave shared experts out.

    A shared expert, which every token takes, scores as the highest of its block, or 1 where there is none.
    """
    highest = {block: scores.max() for block, scores in routed.items()}
    return [
        routed[bank.block] if bank.name == "routed" else np.full(bank.experts, highest.get(bank.block, 1.0))
        for bank in banks
    ]


def check_word(method: Sensitivity, option: str, words: Sequence[str]) -> None:
    """
    Check an option that takes one of some words.

    Raises:
        BadOption: it is another one.
    """
    value = getattr(method, option)
    if value not in words:
        raise BadOption(name=method.name, option=f"{option}={value}", reason=f"it is {' or '.join(words)}")


def by_block(banks: Sequence[SeenBank]) -> dict[str, list[SeenBank]]:
    """Sort banks by their block."""
    found: dict[str, list[SeenBank]] = {}
    for bank in banks:
        found.setdefault(bank.block, []).append(bank)
    return found
