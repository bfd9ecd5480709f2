"""The scheduler of many texts at once. It decides which passes travel together, who may begin, and who has to make
room.

It has no thread and no clock of its own. Each text is a coroutine (see `decoding.passes`) that runs until it asks for a
pass. Passes of one model with one pool are then computed together. A row's result does not depend on its company (law
1), so each text is the same as alone (law 9). Everything that could change that is done between rounds. A text that is
preempted loses its pages and nothing else. They are computed again before its next round.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from tokenswift_py.core import Model, Output
from tokenswift_py.decoding.passes import Pass
from tokenswift_py.kvcache.base import PAGE_SIZE, PagePool
from tokenswift_py.kvcache.pages import ROUND_PAGES as ROUND_PAGES
from tokenswift_py.serving.flights import Flight, flights_of
from tokenswift_py.serving.prefixes import Prefixes
from tokenswift_py.serving.seat import Seat as Seat
from tokenswift_py.serving.seat import Work, is_prefill, pages_of, rows_of
from tokenswift_py.serving.sharing import GroupCost, Width


class Scheduler:
    """Computes one pass at each `step`.

    target:       the model that verifies. Passes of any other model are drafts.
    pool:         the pool that holds the pages of all texts.
    most_running: the number of texts that are in work at a time. The others wait.
    most_rows:    the number of rows up to which a pass takes along more prefill.
    clock:        the function that returns the time in seconds.
    """

    def __init__(
        self,
        target: Model,
        pool: PagePool,
        clock: Callable[[], float],
        most_running: int = 16,
        most_rows: int = 128,
    ) -> None:
        self.target, self.pool, self.clock = target, pool, clock
        self.most_running, self.most_rows = most_running, most_rows
        self.prefixes = Prefixes(pool)
        self.seats: list[Seat] = []
        self.preemptions = 0
        self.passes = 0
        self._numbers = itertools.count()
        self._flights: deque[Flight] = deque()  # passes under way, the oldest first
        self._ended = 0.0  # the time when the latest pass ended
        self._costs: defaultdict[int, GroupCost] = defaultdict(GroupCost)
        self._width = Width(self._costs[id(target)])

    @property
    def running(self) -> int:
        return sum(seat.running for seat in self.seats)

    @property
    def waiting(self) -> int:
        return len(self.seats) - self.running

    def fits(self, tokens: int) -> bool:
        """Returns whether a text of this many tokens fits the pool at all, together with the pages that a round
        takes."""
        return pages_of(tokens) + ROUND_PAGES <= self.pool.pages

    def add(self, work: Work) -> Seat:
        """Takes a text, which waits for its turn."""
        seat = Seat(work, next(self._numbers), self.clock())
        self.seats.append(seat)
        return seat

    def cancel(self, seat: Seat) -> None:
        """Ends a text before its next pass. What it has written stays."""
        seat.cancelled = True

    def step(self) -> bool:
        """Begins or ends one pass for the texts that can share it, or both. Returns whether texts are left. A step may
        do neither, if all texts in work end a round without another pass."""
        for seat in [seat for seat in self.seats if seat.cancelled]:
            self._leave(seat, None)
        self._seat_waiting()
        promised = sum(self._needs(seat) for seat in self.seats if seat.asked is not None)
        for seat in self._at_rest():
            if seat.running:
                self._begin_round(seat, promised)
                promised += self._needs(seat) if seat.asked is not None else 0
        if group := self._choose():
            self._begin(group)
        elif self._flights:
            self._end()
        return bool(self.seats)

    @property
    def idle_pages(self) -> int:
        """Returns how many pages are held only for later texts."""
        return self.prefixes.idle

    def close(self, error: Exception | None = None) -> None:
        """Ends all texts as cancelled, or with an error."""
        for seat in list(self.seats):
            self._leave(seat, error)
        while self._flights:
            self._end()
        self.prefixes.make_room(self.pool.pages)

    # Who is in work

    def _urgency(self, seat: Seat) -> tuple[float, int]:
        """Returns a key that sorts the most urgent first. A text gains 1 in AGEING seconds of waiting."""
        waited = 0.0 if seat.running else (self.clock() - seat.since) / AGEING
        return -(seat.work.priority + seat.credit + waited), seat.number

    def _seat_waiting(self) -> None:
        self.prefixes.wanted = None
        waiting = [seat for seat in self.seats if not seat.running]
        while waiting:
            seat = min(waiting, key=self._urgency)
            waiting.remove(seat)
            victims = [other for other in self._at_rest() if self._gives_way(other, seat)]
            if self.running >= self.most_running:
                if not victims:
                    return
                self._preempt(victims.pop())
            if self._find_place(seat, victims):
                seat.credit = min(seat.credit + (self.clock() - seat.since) / AGEING, MOST_CREDIT)
                seat.running = True
                continue
            if self.running:
                self.prefixes.wanted = seat.prefix
                return
            self._leave(seat, self._too_small())

    def _find_place(self, seat: Seat, victims: list[Seat]) -> bool:
        """Makes room for a text that waits, and gives it its known pages. Returns whether it could."""
        cache, tokens, known = seat.work.cache, seat.work.tokens(), list[int]()
        if not cache.length and not seat.work.needs_all_rows():
            seat.prefix.cover(tokens[: len(tokens) - 1])
            known = self.prefixes.find(seat.prefix)
        own = pages_of(len(tokens)) - pages_of(cache.length) - len(known) + ROUND_PAGES
        needed = own + sum(self._needs(other) for other in self.seats if other.running)
        idle = sum(self.pool.holders(page) == 1 for page in known)
        if self._can_have(needed + idle, victims, beside=True):
            if known:
                self.prefixes.attach(cache, known, seat.prefix)
            if self._make_room(needed, victims, beside=True):
                self.prefixes.hits += len(known) * PAGE_SIZE
                return True
        cache.release()
        return False

    def _gives_way(self, other: Seat, seat: Seat) -> bool:
        """Returns whether a text in work makes room for one that waits. It does if its priority is lower, and if it is
        also less urgent after all the waiting."""
        return other.work.priority < seat.work.priority and self._urgency(other) > self._urgency(seat)

    def _less_urgent(self, others: Sequence[Seat], seat: Seat) -> list[Seat]:
        own = self._urgency(seat)
        return [other for other in others if self._urgency(other) > own]

    def _at_rest(self) -> list[Seat]:
        """Returns the texts in work that are between rounds, the most urgent first."""
        resting = [seat for seat in self.seats if seat.running and seat.asked is None]
        return sorted(resting, key=self._urgency)

    def _can_have(self, pages: int, victims: Sequence[Seat], beside: bool) -> bool:
        """Returns whether this many pages could be made free.

        beside: whether they include the pages that a round of each victim may take.
        """
        if pages <= self.pool.free + self.prefixes.idle:
            return True
        held = self.prefixes.freed([victim.work.cache for victim in victims])
        promised = sum(map(self._needs, victims)) if beside else 0
        return pages <= self.pool.free + self.prefixes.idle + held + promised

    def _make_room(self, pages: int, victims: list[Seat], beside: bool = False) -> bool:
        """Makes this many pages free. Idle pages are given back first, then those of the victims, the last victim
        first. Returns whether it could. `beside` is the same as for `_can_have`."""
        if not self._can_have(pages, victims, beside):
            return False  # nobody is preempted in vain
        while pages > self.pool.free:
            self.prefixes.make_room(pages - self.pool.free)
            if pages > self.pool.free:
                if not victims:
                    return False
                pages -= self._needs(victims[-1]) if beside else 0
                self._preempt(victims.pop())
        return True

    def _too_small(self) -> MemoryError:
        return MemoryError(f"a KV pool of {self.pool.pages} pages is too small for this text")

    def _needs(self, seat: Seat) -> int:
        """Returns how many pages its round may take, beside those it holds."""
        length = seat.work.cache.length
        rows = max(len(seat.work.tokens()) - length, 0) + (0 if seat.asked else seat.work.rows_ahead())
        return pages_of(length + rows) - pages_of(length) + ROUND_PAGES

    def _preempt(self, seat: Seat) -> None:
        """Takes a text's pages. Those that are known stay until they are needed."""
        self.prefixes.keep(seat.work.cache, seat.work.tokens(), seat.prefix)
        seat.work.cache.release()
        seat.work.set_aside()
        seat.running, seat.since, seat.prefix.told = False, self.clock(), 0
        self.preemptions += 1

    # Rounds

    def _begin_round(self, seat: Seat, promised: int) -> None:
        """Lets a text go on until it asks for a pass, if its round has room beside the pages that are promised."""
        needed = self._needs(seat) + promised
        if needed > self.pool.free and not self._make_room(needed, self._less_urgent(self._at_rest(), seat)):
            others = [other for other in self.seats if other.running and other is not seat]
            if not others:
                self._leave(seat, self._too_small())
            elif not self._less_urgent(others, seat):
                self._preempt(seat)
            return  # otherwise the round waits until less urgent texts end theirs
        if seat.text is None:
            seat.text = seat.work.passes()
        elif seat.work.cache.length < len(seat.work.tokens()) - 1:
            self._resume(seat, seat.work.recompute(), None)
            return
        self._resume(seat, seat.text, None)

    def _resume(self, seat: Seat, coroutine: Generator[Any, Any, None], output: Output | None) -> None:
        """Runs a text's coroutine until it asks for a pass, ends a round, or ends."""
        work, seat.asked = seat.work, None
        work.time.resume()
        try:
            asked = coroutine.send(output)
        except StopIteration:
            if coroutine is seat.text:
                self._leave(seat, None)
            return
        except Exception as error:
            self._leave(seat, error)
            return
        finally:
            work.time.suspend()
        if isinstance(asked, Pass):
            seat.asked, seat.coroutine = asked, coroutine
            return
        self.prefixes.keep(work.cache, work.tokens(), seat.prefix)
        work.tell(asked)
        if work.finished():  # it ends now: it waits for no room, and nobody waits for its pages
            self._resume(seat, coroutine, None)

    def _leave(self, seat: Seat, error: BaseException | None) -> None:
        """Ends a text. Its coroutine gives its pages back, if it has not done so yet."""
        if seat not in self.seats:
            return
        self.seats.remove(seat)
        seat.running, seat.asked = False, None
        try:
            if seat.text is not None:
                seat.text.close()
        except Exception as raised:
            error = error or raised
        finally:
            seat.work.cache.release()
            seat.work.end(error)

    # Passes

    def _choose(self) -> list[Seat]:
        """Returns the texts whose passes are computed next. All drafts of one model come before any verification, so
        that verifications travel together. A verification takes along as many chunks of prompts as its rows leave room
        for. The most urgent prompts go first."""
        asking = sorted((seat for seat in self.seats if seat.asked is not None and not seat.flies), key=self._urgency)
        if not asking:
            return []
        groups: defaultdict[tuple[int, int], list[Seat]] = defaultdict(list)
        for seat in asking:
            assert seat.asked is not None
            groups[id(seat.asked.model), id(seat.asked.segment.cache.pool)].append(seat)
        drafts = [group for (model, _), group in groups.items() if model != id(self.target)]
        group = (drafts or list(groups.values()))[0]
        share = -(-self.running // flights_of(self.target))  # the others travel in the next pass
        chosen = [seat for seat in group if not is_prefill(seat)][:share]
        rows = sum(map(rows_of, chosen))
        for number, seat in enumerate(filter(is_prefill, group)):
            # The most urgent prompt gets on beside any verification, however many rows that has.
            if number == 0 or rows + rows_of(seat) <= self.most_rows:
                chosen.append(seat)
                rows += rows_of(seat)
        return chosen

    def _begin(self, group: list[Seat]) -> None:
        """Begins the passes of these texts. Ends the oldest pass where enough are under way."""
        passes = [seat.asked for seat in group if seat.asked is not None]
        if passes[0].model is self.target:
            passes = self._width.cut(passes)
        flight = Flight(group, passes, self.clock)
        try:
            flight.begin()
        except Exception as error:
            self._failed(flight, error)
            return
        self._flights.append(flight)
        if len(self._flights) >= flights_of(flight.model):
            self._end()

    def _end(self) -> None:
        """Waits for the pass that began first, and lets its texts go on."""
        flight = self._flights.popleft()
        for seat in flight.group:
            seat.flies = False
        try:
            outputs, ended, lost = flight.end()
        except Exception as error:
            self._failed(flight, error)
            return
        self.passes += 1
        began, self._ended = max(flight.began, self._ended), ended  # what passes do side by side is paid once
        seconds = ended - began
        if flight.model is self.target and not lost:
            self._width.observe(1e3 * began, 1e3 * ended, 1e3 * seconds)
        shares = self._costs[id(flight.model)].split(flight.passes, 1e3 * seconds, lost)
        for seat, output, ms in zip(flight.group, outputs, shares, strict=True):
            if seat in self.seats:  # it was not cancelled in the meantime
                seat.work.time.charge(ms / 1e3, lost)
                assert seat.coroutine is not None
                self._resume(seat, seat.coroutine, output)

    def _failed(self, flight: Flight, error: Exception) -> None:
        flight.undo()
        for seat in (seat for seat in flight.group if seat in self.seats):
            if len(flight.group) == 1:
                self._fail(seat, error)
            else:  # one pass may be at fault, or all may be too many; alone their rows are the same
                self._begin([seat])

    def _fail(self, seat: Seat, error: Exception) -> None:
        """Tells a text that its pass could not be computed, where it waits for the pass. The text ends."""
        assert seat.coroutine is not None
        try:
            seat.coroutine.throw(error)
        except Exception as raised:
            error = raised
        self._leave(seat, error)


AGEING = 30.0
MOST_CREDIT = 2.0  # what a text in work has left of its waiting: after hours of it, it would give way to nobody
