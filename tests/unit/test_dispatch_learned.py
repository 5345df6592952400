"""Durations learned while serving: robust, by batch size, and bounded."""

from __future__ import annotations

from paceline.dispatch.learned import MOST_LEARNED, WINDOW, Learned, LearnedDuration


def test_a_stall_moves_neither_the_median_nor_the_p95() -> None:
    learned = Learned()
    for number in range(WINDOW):
        learned.add("m", "g0", "gpu", 8, 30.0 if number in (5, 20, 40) else 0.1)
    assert learned.all() == (LearnedDuration("m", "g0", "gpu", 8, WINDOW, 0.1, 0.1),)


def test_what_has_become_slower_is_believed_once_the_window_is_full_of_it() -> None:
    learned = Learned()
    for _ in range(10 * WINDOW):
        learned.add("m", "g0", "gpu", 1, 0.1)
    for number in range(1, WINDOW + 1):
        learned.add("m", "g0", "gpu", 1, 0.1 + number / 1000)
    (found,) = learned.all()
    assert found.count == 11 * WINDOW
    assert found.median_s == 0.1 + (WINDOW // 2) / 1000
    assert found.p95_s == 0.1 + 61 / 1000, "the 61st of 64"


def test_batch_sizes_models_and_machines_are_kept_apart_and_told_in_order() -> None:
    learned = Learned()
    for model, machine, size in (("b", "g0", 2), ("a", "g1", 16), ("a", "g0", 4), ("a", "g1", 2)):
        learned.add(model, machine, "gpu", size, 1.0)
    told = [(d.model, d.machine, d.batch_size) for d in learned.all()]
    assert told == [("a", "g0", 4), ("a", "g1", 2), ("a", "g1", 16), ("b", "g0", 2)]
    learned.forget("g1")
    assert [d.machine for d in learned.all()] == ["g0", "g0"]


def test_the_longest_known_combination_is_forgotten_for_a_new_one() -> None:
    learned = Learned()
    for size in range(1, MOST_LEARNED + 2):
        learned.add("m", "g0", "gpu", size, 1.0)
    sizes = [found.batch_size for found in learned.all()]
    assert sizes == list(range(2, MOST_LEARNED + 2))
