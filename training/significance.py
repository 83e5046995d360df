"""How sure a measured rate is, and whether two checkpoints differ by more than chance.

Two checkpoints answer the same items, so the tests compare them item by item, which shows smaller
differences than comparing two intervals would.
"""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.96  # a normal variable stays within so many standard deviations 95 % of the time
ROUNDS = 10_000  # random draws of the bootstrap and of the sign-flip test
DRAWS_AT_A_TIME = 2**22  # bounds the memory that they take


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson, 1927), sound for rates near 0 and 1 as well."""
    rate, spread = right / total, Z * Z / total
    centre = (rate + spread / 2) / (1 + spread)
    margin = Z / (1 + spread) * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    return max(0.0, centre - margin), min(1.0, centre + margin)


def bootstrap_interval(
    bits: Sequence[float], sizes: Sequence[int], seed: int
) -> tuple[float, float]:
    """The 95 % interval of sum(bits) / sum(sizes) if other texts had been drawn (Efron, 1979)."""
    rng, bits_N, sizes_N = np.random.default_rng(seed), np.array(bits), np.array(sizes)
    ratios = []
    for rounds in rounds_at_a_time(len(bits_N)):
        drawn_RN = rng.integers(len(bits_N), size=(rounds, len(bits_N)))
        ratios.append(bits_N[drawn_RN].sum(1) / sizes_N[drawn_RN].sum(1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def mcnemar_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """p-value of two checkpoints' right and wrong answers to the same items (McNemar, 1947).

    Only items that just one of them got right tell. If the two were equally good, each of those
    would have gone to either with probability 1/2: the exact two-sided binomial test.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total = only_first + only_second
    tail, ways = 0, 1  # ways to choose k of the items: each follows from the one before
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def sign_flip_test(differences: Sequence[float], seed: int) -> float:
    """p-value of paired differences, whose sum is about 0 if the two are alike (Fisher, 1935).

    If they were, each difference could as well have had the other sign: the p-value is the share of
    random signs whose sum is as far from 0 as the one found, which counts as a draw itself.
    """
    rng, differences_N = np.random.default_rng(seed), np.array(differences)
    found = abs(differences_N.sum())
    # Sums in another order differ in the last digits, and equal ones must count.
    bound = found - 1e-9 * np.abs(differences_N).sum()
    as_far = 1
    for rounds in rounds_at_a_time(len(differences_N)):
        signs_RN = rng.choice((-1.0, 1.0), size=(rounds, len(differences_N)))
        as_far += int((np.abs(signs_RN @ differences_N) >= bound).sum())
    return as_far / (ROUNDS + 1)


def rounds_at_a_time(items: int) -> list[int]:
    """`ROUNDS` in parts, so that each draws few enough numbers for `items`."""
    part = max(1, DRAWS_AT_A_TIME // items)
    return [min(part, ROUNDS - done) for done in range(0, ROUNDS, part)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made that many tests (Holm, 1979).

    Of 20 tests one falls below 0.05 by chance. Calling only those a difference whose adjusted
    value is below 0.05 errs in 5 % of the reports at most, however the tests depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
