"""Whole numbers: primes, divisors, digits, bases."""
import math
import random

from .kinds import KINDS, Task, whole

IS_PRIME = "all(n % k for k in range(2, int(n**0.5) + 1))"


def prime(n: int) -> bool:
    return n > 1 and not any(n % k == 0 for k in range(2, n) if k * k <= n)


def sieve(n: int) -> list[int]:
    """The primes up to n, by Eratosthenes; the code divides instead."""
    marks = [False, False, *[True] * (n - 1)]
    for k in range(2, int(n**0.5) + 1):
        if marks[k]:
            marks[k * k :: k] = [False] * len(marks[k * k :: k])
    return [k for k, mark in enumerate(marks) if mark]


@KINDS.add("primes", weight=1.5)
def is_prime(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 2, 5) | 1 if rng.random() < 0.8 else whole(rng, 2, 5)
    yes = prime(n)
    verdict = {"zh": "是质数" if yes else "不是质数",
               "en": "is a prime" if yes else "is not a prime"}[language]
    return Task({"n": n, "verdict": verdict}, f"n = {n}\nprint(n > 1 and {IS_PRIME})",
                texts=(str(yes),), verdict=verdict)


@KINDS.add("primes")
def count_primes(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 10, 4)
    return Task({"n": n}, f"primes = [n for n in range(2, {n} + 1) if {IS_PRIME}]\n"
                "print(len(primes))", numbers=(len(sieve(n)),))


@KINDS.add("primes")
def list_primes(rng: random.Random, language: str, state: dict) -> Task | None:
    a = whole(rng, 2, 3)
    b = a + rng.randint(5, 40)
    found = [n for n in sieve(b) if n >= a]
    return Task({"a": a, "b": b}, f"primes = [n for n in range({a}, {b} + 1) if {IS_PRIME}]\n"
                "print(primes)", numbers=tuple(found)) if found else None


@KINDS.add("primes")
def factorize(rng: random.Random, language: str, state: dict) -> Task | None:
    factors = sorted(rng.choices((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43),
                                 (8, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1), k=rng.randint(2, 5)))
    n = math.prod(factors)
    code = (f"n = {n}\nfactors = []\nk = 2\nwhile n > 1:\n    if n % k == 0:\n"
            "        factors.append(k)\n        n //= k\n    else:\n        k += 1\nprint(factors)")
    return Task({"n": n}, code, numbers=tuple(factors))


def euclid(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@KINDS.add("primes")
def gcd(rng: random.Random, language: str, state: dict) -> Task:
    common = rng.randint(1, 60)
    a, b = common * rng.randint(2, 99), common * rng.randint(2, 99)
    return Task({"a": a, "b": b}, f"from math import *\n\nresult = gcd({a}, {b})\nprint(result)",
                numbers=(euclid(a, b),), state={"result": float(euclid(a, b))})


@KINDS.add("primes")
def lcm(rng: random.Random, language: str, state: dict) -> Task:
    common = rng.randint(1, 30)
    a, b = common * rng.randint(2, 60), common * rng.randint(2, 60)
    value = a * b // euclid(a, b)
    return Task({"a": a, "b": b}, f"from math import *\n\nresult = lcm({a}, {b})\nprint(result)",
                numbers=(value,), state={"result": float(value)})


@KINDS.add("integers")
def factorial(rng: random.Random, language: str, state: dict) -> Task:
    n = rng.randint(3, 40)
    return Task({"n": n}, f"from math import *\n\nprint(factorial({n}))",
                numbers=(math.prod(range(1, n + 1)),))


def ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


@KINDS.add("integers")
def fibonacci(rng: random.Random, language: str, state: dict) -> Task:
    n = rng.randint(3, 99)
    root5 = math.sqrt(5)
    previous, value = 0, 1
    for _ in range(n - 1):
        previous, value = value, previous + value
    assert n > 60 or value == round(((1 + root5) / 2) ** n / root5)  # Binet's formula
    return Task({"n": n, "nth": ordinal(n)},
                f"a, b = 0, 1\nfor _ in range({n}):\n    a, b = b, a + b\nprint(a)",
                numbers=(value,))


@KINDS.add("integers")
def digit_sum(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 100, 10)
    total, rest = 0, n
    while rest:
        rest, digit = divmod(rest, 10)
        total += digit
    return Task({"n": n}, f"print(sum(int(c) for c in str({n})))", numbers=(total,))


@KINDS.add("integers")
def divisors(rng: random.Random, language: str, state: dict) -> Task | None:
    n = whole(rng, 6, 3)
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    found = sorted({*small, *(n // k for k in small)})
    return Task({"n": n}, f"n = {n}\nprint([k for k in range(1, n + 1) if n % k == 0])",
                numbers=tuple(found)) if len(found) < 13 else None


@KINDS.add("integers")
def binary(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 2, 5)
    return Task({"n": n}, f"print(bin({n}))", texts=(f"0b{n:b}",))


@KINDS.add("integers", weight=0.7)
def hexadecimal(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 10, 6)
    return Task({"n": n}, f"print(hex({n}))", texts=(f"0x{n:x}",))


@KINDS.add("integers")
def sum_to(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 5, 4)
    value = n * (n + 1) // 2
    return Task({"n": n}, f"result = sum(range(1, {n} + 1))\nprint(result)", numbers=(value,),
                state={"result": float(value)})


@KINDS.add("integers")
def sum_squares(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 3, 3)
    value = n * (n + 1) * (2 * n + 1) // 6
    return Task({"n": n}, f"result = sum(k**2 for k in range(1, {n} + 1))\nprint(result)",
                numbers=(value,), state={"result": float(value)})
