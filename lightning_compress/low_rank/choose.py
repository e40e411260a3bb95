"""Which form and rank each layer gets: by a rank, by the variance that it keeps, or by one budget for all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lightning_compress.low_rank.costs import Cost, Costs, by_macs
from lightning_compress.low_rank.ranks import DENSE, BudgetError, Option, spend
from lightning_compress.low_rank.sites import Site
from lightning_compress.replacement.times import time_forms

_MEASURED = 4  # ranks of each form that are timed; others lie on lines between them
_STEP = 8  # ranks that are timed, and chosen by time, are multiples of it: kernels work on blocks of channels
_UNITS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "seconds"}


@dataclass(frozen=True)
class Choice:
    """What was decided about a layer, or about layers that share a weight.

    Attributes:
        option: Its form, numbers and cost; the form "dense" leaves it as it is.
        before: Its parameters, and its multiply-accumulates for a batch.
        after: Those afterwards.
        dense: What it costs as it is, in the unit of the choice.
        why: The reason where it stays as it is.
    """

    option: Option
    before: Costs
    after: Costs
    dense: float
    why: str = ""


class Chooser:
    """Chooses among the forms of sites by one unit of cost.

    Args:
        sites: What may be replaced, by name.
        cost: The unit.
        clock: Returns the time in seconds.
    """

    def __init__(self, sites: Mapping[str, Site], cost: Cost, clock: Callable[[], float]) -> None:
        self.sites, self.cost, self.clock = sites, cost, clock
        self._times: dict[str, dict[str, Callable[[float], float]]] = {}

    def by_rank(self, ranks: Mapping[str, int]) -> dict[str, Choice]:
        """Give each site its rank, in the form that loses least for the cost that it saves, or leave it."""
        found = {}
        for name, site in self.sites.items():
            options = [
                option
                for form in site.forms()
                if (numbers := site.of_rank(form, ranks[name])) is not None
                for option in self._options(site, form, [numbers])
            ]
            dense = self._dense(site)
            cheaper = [
                (one.loss / (dense.cost - one.cost), n) for n, one in enumerate(options) if one.cost < dense.cost
            ]
            if cheaper:
                found[name] = self._choice(site, options[min(cheaper)[1]])
            elif options:
                found[name] = self._stays(site, f"rank {ranks[name]} {self._is_dearer(options, dense)}")
            else:
                found[name] = self._stays(site, site.why_not() or f"it has no rank {ranks[name]}")
        return found

    def by_energy(self, energy: float) -> dict[str, Choice]:
        """Give each site the cheapest form that keeps a share of the variance of its outputs, or leave it."""
        found = {}
        for name, site in self.sites.items():
            dense = self._dense(site)
            options = [one for form in site.forms() for one in self._options(site, form, site.numbers(form))]
            keeps = [one for one in options if one.lost <= 1 - energy + 1e-12]
            cheapest = min(keeps, key=lambda one: one.cost, default=None)
            if cheapest is not None and cheapest.cost < dense.cost:
                found[name] = self._choice(site, cheapest)
            else:
                dearer = f"no form of it that keeps {energy:g} of the variance has fewer {_UNITS[self.cost]}"
                found[name] = self._stays(site, site.why_not() or dearer)
        return found

    def by_budget(self, budget: float, total: float, saved: float = 0.0) -> dict[str, Choice]:
        """Spend one budget over all sites.

        Args:
            budget: The share of the cost that is left.
            total: What the whole network costs; what it has beyond the sites stays.
            saved: How much less it costs already, because layers were replaced before.

        Raises:
            ValueError: It can't be met.
        """
        if budget >= 1:
            return {name: self._stays(site, "the budget is all that there is") for name, site in self.sites.items()}
        layers = {name: [self._dense(site), *self._cheaper(site)] for name, site in self.sites.items()}
        fixed = max(total - saved - sum(options[0].cost for options in layers.values()), 0.0)
        try:
            chosen = spend(layers, budget * total - fixed)
        except BudgetError as error:
            raise ValueError(
                f"budget={budget:g} of the {_UNITS[self.cost]} can't be met: the least possible is "
                f"{_up((error.least + fixed) / total)}, with the cheapest form of every layer that may be replaced: "
                f"{', '.join([*layers][:3])}{f' and {len(layers) - 3} more' if len(layers) > 3 else ''}."
            ) from error
        return {
            name: self._choice(self.sites[name], option)
            if option.form != DENSE
            else self._stays(
                self.sites[name],
                "the budget is met without it"
                if len(layers[name]) > 1
                else self.sites[name].why_not() or f"no form of it has fewer {_UNITS[self.cost]}",
            )
            for name, option in chosen.items()
        }

    def _dense(self, site: Site) -> Option:
        if self.cost == "latency":
            return Option(DENSE, (), self._times_of(site)[DENSE](site.dense.macs), 0.0)
        return Option(DENSE, (), getattr(site.dense, self.cost), 0.0)

    def _cheaper(self, site: Site) -> list[Option]:
        dense = self._dense(site).cost
        options = (one for form in site.forms() for one in self._options(site, form, site.numbers(form)))
        return [one for one in options if one.cost < dense]

    def _options(self, site: Site, form: str, numbers: Iterable[tuple[int, ...]]) -> list[Option]:
        """Return a form at some ranks; those that have too many multiply-accumulates to gain time are not timed."""
        numbers = list(numbers)
        if self.cost == "latency" and len(numbers) > 1:
            numbers = [one for one in numbers if _is_round(one)] or numbers
        costs = {one: site.costs(form, one) for one in numbers}
        if self.cost == "latency":
            times = self._times_of(site)
            amounts = {one: times[form](cost.macs) for one, cost in costs.items() if form in times}
        else:
            amounts = {one: float(getattr(cost, self.cost)) for one, cost in costs.items()}
        dense = self._dense(site).cost
        worth = [one for one, amount in amounts.items() if amount < dense or len(numbers) == 1]
        return [Option(form, one, amounts[one], lost) for one, lost in zip(worth, site.lost(form, worth), strict=True)]

    def _times_of(self, site: Site) -> dict[str, Callable[[float], float]]:
        """Return the seconds of the site by its multiply-accumulates, for each form and as it is."""
        if site.name not in self._times:
            measured: dict[str, list[tuple[str, tuple[int, ...], int]]] = {}
            for form in site.forms():
                costs = [(one, site.costs(form, one).macs) for one in site.numbers(form)]
                costs = [(one, macs) for one, macs in costs if 0 < macs < site.dense.macs]
                costs = sorted([one for one in costs if _is_round(one[0])] or costs, key=lambda one: one[1])
                places = {round(k * (len(costs) - 1) / (_MEASURED - 1)) for k in range(_MEASURED)} if costs else set()
                measured[form] = [(f"{form} {costs[k][0]}", *costs[k]) for k in sorted(places)]
            forms = {
                label: site.timed_as(form, numbers) for form, some in measured.items() for label, numbers, _ in some
            }
            dense, seconds = time_forms(site.timed(), forms, clock=self.clock)
            self._times[site.name] = {
                form: by_macs([(macs, seconds[label]) for label, _, macs in some])
                for form, some in measured.items()
                if some
            } | {DENSE: lambda _: dense}
        return self._times[site.name]

    def _choice(self, site: Site, option: Option) -> Choice:
        return Choice(option, site.dense, site.costs(option.form, option.numbers), self._dense(site).cost)

    def _stays(self, site: Site, why: str) -> Choice:
        dense = self._dense(site)
        return Choice(dense, site.dense, site.dense, dense.cost, why)

    def _is_dearer(self, options: Iterable[Option], dense: Option) -> str:
        least = min(one.cost for one in options)
        if self.cost == "latency":
            return f"takes {1000 * least:.3g} ms instead of {1000 * dense.cost:.3g} ms"
        return f"takes {least:,.0f} instead of {dense.cost:,.0f} {_UNITS[self.cost]}"


def _is_round(numbers: tuple[int, ...]) -> bool:
    return all(one % _STEP == 0 for one in numbers)


def _up(share: float) -> str:
    """Return a share, rounded so that it is not below what it was."""
    return f"{-(-share * 1000 // 1) / 1000:g}"
