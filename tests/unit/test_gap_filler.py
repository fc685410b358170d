"""Events of a feed in order: which are kept, and when the store has to be asked."""

from __future__ import annotations

from producers.gap_filler import MAX_BUFFERED_BYTES, MAX_BUFFERED_EVENTS, GapFiller


def filled(*numbers: int, size: int = 1) -> GapFiller[str]:
    filler: GapFiller[str] = GapFiller()
    for number in numbers:
        filler.receive(number, f"event {number}", size)
    return filler


def after(filler: GapFiller[str], number: int) -> list[int]:
    found = filler.buffered_after(number)
    assert all(payload == f"event {each}" for each, payload in found)
    return [each for each, _ in found]


def test_what_is_buffered_follows_the_number_without_a_gap() -> None:
    """And is nothing if the next event is not there."""
    filler = filled(3, 4, 5)
    assert [after(filler, number) for number in range(1, 7)] == [
        *([], [3, 4, 5], [4, 5], [5]),
        *([], []),
    ]


def test_an_event_that_comes_twice_or_late_is_dropped() -> None:
    filler = filled(3, 4, 4, 3, 2, 5)
    assert after(filler, 2) == [3, 4, 5]
    assert filler.last == 5


def test_a_gap_drops_what_was_before_it() -> None:
    """The events in between are only in the store, and so a reader asks it."""
    filler = filled(1, 2, 5, 6)
    assert after(filler, 1) == []
    assert after(filler, 2) == []
    assert after(filler, 4) == [5, 6]


def test_the_buffer_is_bounded_in_events_and_in_bytes() -> None:
    """The oldest go first; one that is larger than the bound is not kept at all."""
    filler = filled(*range(1, MAX_BUFFERED_EVENTS + 11))
    assert after(filler, 9) == []
    assert len(after(filler, 10)) == MAX_BUFFERED_EVENTS
    half = MAX_BUFFERED_BYTES // 2
    filler = filled(1, 2, 3, 4, size=half)
    assert (after(filler, 1), after(filler, 2)) == ([], [3, 4])
    filler.receive(5, "event 5", 2 * half + 1)
    assert after(filler, 3) == []
    filler.receive(6, "event 6", half)  # what is gone no longer counts
    filler.receive(7, "event 7", half)
    assert after(filler, 5) == [6, 7]


def test_a_number_of_the_store_is_a_gap_as_well() -> None:
    """What is published behind it is in order again."""
    filler = filled(1, 2)
    filler.advance(4)
    filler.advance(3)
    assert filler.last == 4
    filler.receive(4, "event 4", 1)
    assert after(filler, 3) == []
    filler.receive(5, "event 5", 1)
    assert after(filler, 4) == [5]


def test_the_store_is_right() -> None:
    """A number that was published and is not stored is forgotten, unless another came since."""
    filler = filled(1, 99)
    assert filler.reconcile(stored=1, assumed=99)
    assert filler.last == 1
    assert after(filler, 98) == []
    filler.receive(2, "event 2", 1)
    assert not filler.reconcile(stored=1, assumed=1)
    assert filler.last == 2
    assert after(filler, 1) == [2]
    assert not filler.reconcile(stored=5, assumed=2)
    assert filler.last == 5
