"""Whose call is next: by class, then by the tokens that each tenant was served. Pure: no clock, no waiting.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): each tenant has a
counter of the cost that it was served, the smallest goes first, and who comes back from idleness is lifted to the
smallest of those that wait, so that no credit is saved up. As in its section 4.4 what runs counts as it is expected to
end: else a tenant enters many calls before the first is counted. The counter itself, to which others are lifted, has
only what was served.

Beyond the paper, for the time to the first token: while an interactive *party* (a tenant in one class) is there, or was
lately, the others leave a share of the places free, and a prompt of who was served more waits while more than a quantum
is in prefill of its own party and of those that were served less, and a moment longer (`rest_s`). So who was served
least finds a place, and at most one prefill ahead of it, or none. A party alone is never held back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cachetools import LRUCache

from app.admission.work import Work
from app.domain import Priority

# So long after its last call a party still counts as there: people pause between two questions.
LATELY_S = 30.0
# A batch call that has waited for so long is treated as an interactive one, so none waits for ever.
AGED_S = 30.0
# Part of the places that a party leaves to interactive others.
RESERVE = 4
# Part of the time that a prefill took.
_REST = 0.1
# So many calls that wait are a backlog, whatever holds them.
_BACKLOG = 8
# Counters of so many tenants; who is forgotten starts like a new one.
_TENANTS = 10_000


@dataclass(frozen=True, slots=True)
class Places:
    """What the engine takes at a time; None: as much as comes. `quantum`: prompt tokens of one party in prefill."""

    sequences: int | None = None
    kv_tokens: int | None = None
    quantum: int = 256

    @property
    def shared(self) -> int | None:
        """The places that one party may fill while an interactive other is there."""
        return None if self.sequences is None else max(1, self.sequences - self.sequences // RESERVE)


@dataclass(eq=False, slots=True)
class Entry:
    """One call that waits for the engine, or that it works on. `since` is when it came; `name` is its flight's."""

    tenant: str
    priority: Priority
    work: Work
    since: float
    name: str = ""
    enter: Callable[[], None] = lambda: None
    entered: float = 0.0
    is_prefilling: bool = True
    party: Party = field(init=False, repr=False)


@dataclass(eq=False, slots=True)
class Party:
    """A tenant's calls of one class: those that wait, in order, and what the engine has of it."""

    tenant: str
    priority: Priority
    seen: float = 0.0
    waiting: dict[Entry, None] = field(default_factory=dict)
    waiting_tokens: int = 0
    waiting_cost: float = 0.0
    running: int = 0
    running_cost: float = 0.0
    sequences: int = 0
    prefilling: int = 0

    @property
    def head(self) -> Entry:
        return next(iter(self.waiting))


class FairQueue:
    """The calls that wait and those that run, and the tenants' counters."""

    def __init__(self) -> None:
        self.places = Places()
        self.parties: dict[tuple[str, Priority], Party] = {}
        self.counters: LRUCache[str, float] = LRUCache(_TENANTS)
        self.running = 0
        self._sequences = 0
        self._tokens = 0
        self._last_left = 0.0

    # --- coming and going ----------------------------------------------------------------------

    def add(self, entry: Entry, now: float) -> None:
        """Let a call wait."""
        self._lift(entry.tenant)
        self._seat(entry, self._party(entry.tenant, entry.priority))
        entry.party.seen = now

    def remove(self, entry: Entry) -> None:
        """A call that waits goes without having entered."""
        party = entry.party
        del party.waiting[entry]
        party.waiting_tokens -= entry.work.tokens
        party.waiting_cost -= entry.work.cost

    def hasten(self, name: str, now: float) -> None:
        """A batch call that waits becomes interactive: somebody who is in a hurry wants its answer too."""
        for party in self._waiting():
            entry = next((each for each in party.waiting if each.name == name), None)
            if entry is not None and party.priority is Priority.BATCH:
                self.remove(entry)
                entry.priority = Priority.INTERACTIVE
                self.add(entry, now)
                return

    def next(self, now: float) -> Entry | None:
        """The call that enters now, or None where nobody waits or the engine has no place for who does."""
        heads = [party.head for party in self._waiting()]
        urgent = [each for each in heads if each.priority is Priority.INTERACTIVE or now - each.since >= AGED_S]
        patient = [each for each in heads if each not in urgent]
        for group in (urgent, patient):
            if fit := [each for each in group if self._may_enter(each, now)]:
                chosen = min(fit, key=lambda each: (self._charged(each.tenant), each.since))
                self._enter(chosen)
                return chosen
        return None

    def said(self, entry: Entry) -> None:
        """The prefill of a call is over, and its rest."""
        if entry.is_prefilling:
            entry.is_prefilling = False
            entry.party.prefilling -= entry.work.prompt_tokens

    def end(self, entry: Entry, now: float, cost: float) -> None:
        """The engine is done with a call that cost so much."""
        self.said(entry)
        self._count(entry, -1)
        entry.party.seen = now
        self.counters[entry.tenant] = self._counter(entry.tenant) + cost
        self._forget(now)

    def rest_s(self, entry: Entry, now: float) -> float:
        """How long after its first token a prompt still counts as in prefill: at least a step of tokens alone fits in.

        Without it long prompts of who floods stand back to back, and whoever comes waits for half of one in the mean.
        """
        is_long = entry.work.prompt_tokens > self.places.quantum
        return _REST * (now - entry.entered) if is_long else 0.0

    # --- looking -------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether the engine has all that it can work on, and more waits: not where one call waits for another's."""
        calls, most = self.calls(), self.places.sequences
        return calls >= _BACKLOG or (calls > 0 and most is not None and self._sequences >= most)

    def calls(self, priority: Priority | None = None) -> int:
        """How many wait."""
        return sum(len(party.waiting) for party in self._waiting(priority))

    def tokens(self, priority: Priority | None = None) -> int:
        return sum(party.waiting_tokens for party in self._waiting(priority))

    def cost(self, priority: Priority | None = None) -> float:
        return sum(party.waiting_cost for party in self._waiting(priority))

    def of_tenant(self, tenant: str) -> tuple[int, int]:
        """Calls and tokens of one tenant that wait."""
        own = [party for party in self._waiting() if party.tenant == tenant]
        return sum(len(party.waiting) for party in own), sum(party.waiting_tokens for party in own)

    def ahead(self, tenant: str, priority: Priority) -> float:
        """The cost that is served before a call that came now: the tenant's own, as much again for each other tenant of
        the class, and all of the class above."""
        above = self.cost(Priority.INTERACTIVE) if priority is Priority.BATCH else 0.0
        parties = list(self._waiting(priority))
        own = next((party.waiting_cost for party in parties if party.tenant == tenant), 0.0)
        return above + sum(min(own, party.waiting_cost) for party in parties)

    # --- inside --------------------------------------------------------------------------------

    def _party(self, tenant: str, priority: Priority) -> Party:
        return self.parties.setdefault((tenant, priority), Party(tenant, priority))

    def _waiting(self, priority: Priority | None = None) -> Iterator[Party]:
        for party in self.parties.values():
            if party.waiting and priority in (None, party.priority):
                yield party

    def _seat(self, entry: Entry, party: Party) -> None:
        entry.party = party
        party.waiting[entry] = None
        party.waiting_tokens += entry.work.tokens
        party.waiting_cost += entry.work.cost

    def _counter(self, tenant: str) -> float:
        return float(self.counters.get(tenant, 0.0))

    def _charged(self, tenant: str) -> float:
        """What a tenant was served, and what is expected of that which runs."""
        running = sum(self.parties[tenant, each].running_cost for each in Priority if (tenant, each) in self.parties)
        return self._counter(tenant) + running

    def _lift(self, tenant: str) -> None:
        """The paper's algorithm 2, lines 6 to 13."""
        waiting = {party.tenant for party in self._waiting()}
        if tenant in waiting:
            return
        least = min(map(self._counter, waiting), default=self._last_left)
        self.counters[tenant] = max(self._counter(tenant), least)

    def _may_enter(self, entry: Entry, now: float) -> bool:
        party, places, work = entry.party, self.places, entry.work
        if places.sequences is not None and self._sequences and self._sequences + work.sequences > places.sequences:
            return False
        if not self._has_rival(party, now):
            return True
        if places.shared is not None and party.sequences + work.sequences > places.shared:
            return False
        if places.kv_tokens is not None and self._tokens + work.tokens > places.kv_tokens:
            return False
        less = self._served_less(party, now)
        if not less and party.priority is Priority.INTERACTIVE:
            return True
        ahead = party.prefilling + sum(other.prefilling for other in less)
        return not ahead or ahead + work.prompt_tokens <= places.quantum

    def _served_less(self, party: Party, now: float) -> list[Party]:
        """The interactive others that are there, or were lately, and have had less."""
        charged = self._charged(party.tenant)
        return [
            other
            for other in self.parties.values()
            if other.tenant != party.tenant
            and other.priority is Priority.INTERACTIVE
            and self._is_there(other, now)
            and self._charged(other.tenant) < charged
        ]

    def _is_there(self, party: Party, now: float) -> bool:
        return party.running > 0 or bool(party.waiting) or now - party.seen < LATELY_S

    def _has_rival(self, party: Party, now: float) -> bool:
        """Whether somebody else is, or was lately, there for whom it matters when the first token comes."""
        return any(
            other is not party
            and other.priority is Priority.INTERACTIVE
            and (other.tenant != party.tenant or party.priority is Priority.BATCH)
            and self._is_there(other, now)
            for other in self.parties.values()
        )

    def _enter(self, entry: Entry) -> None:
        self.remove(entry)
        self._count(entry, 1)
        entry.party.prefilling += entry.work.prompt_tokens
        self._last_left = self._counter(entry.tenant)

    def _count(self, entry: Entry, sign: int) -> None:
        self.running += sign
        self._sequences += sign * entry.work.sequences
        self._tokens += sign * entry.work.tokens
        entry.party.running += sign
        entry.party.running_cost += sign * entry.work.cost
        entry.party.sequences += sign * entry.work.sequences

    def _forget(self, now: float) -> None:
        """Parties that are not there any more; there are as many as there are tenants at most."""
        gone = [
            key
            for key, party in self.parties.items()
            if not (party.waiting or party.running) and now - party.seen >= LATELY_S
        ]
        for key in gone:
            del self.parties[key]
