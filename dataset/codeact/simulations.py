"""Small simulations: dice and coins with a seed, growth step by step."""
import math
import random
from fractions import Fraction

from .kinds import KINDS, Task, whole

IMPORT = "from random import *\n\n"


@KINDS.add("simulations")
def dice(rng: random.Random, language: str, state: dict) -> Task:
    seed, n, k = whole(rng, 0, 3), whole(rng, 10, 4), rng.randint(1, 6)
    own = random.Random(seed)
    rolls = [own.randint(1, 6) for _ in range(n)]
    return Task({"seed": seed, "n": n, "k": k},
                f"{IMPORT}seed({seed})\nrolls = [randint(1, 6) for _ in range({n})]\n"
                f"print(rolls.count({k}))", numbers=(len([x for x in rolls if x == k]),))


@KINDS.add("simulations")
def coins(rng: random.Random, language: str, state: dict) -> Task:
    seed, n = whole(rng, 0, 3), whole(rng, 10, 4)
    own = random.Random(seed)
    return Task({"seed": seed, "n": n},
                f"{IMPORT}seed({seed})\nprint(sum(random() < 0.5 for _ in range({n})))",
                numbers=(len([1 for _ in range(n) if own.random() < 0.5]),))


@KINDS.add("simulations", weight=0.7)
def walk(rng: random.Random, language: str, state: dict) -> Task:
    seed, n = whole(rng, 0, 3), whole(rng, 10, 4)
    own, place = random.Random(seed), 0
    for _ in range(n):
        place += own.choice((-1, 1))
    return Task({"seed": seed, "n": n},
                f"{IMPORT}seed({seed})\nprint(sum(choice([-1, 1]) for _ in range({n})))",
                numbers=(place,))


@KINDS.add("simulations", weight=0.7)
def monte_carlo(rng: random.Random, language: str, state: dict) -> Task:
    seed, n = whole(rng, 0, 3), whole(rng, 100, 4)
    own = random.Random(seed)
    points = [(own.random(), own.random()) for _ in range(n)]
    inside = len([1 for x, y in points if math.hypot(x, y) < 1])
    return Task({"seed": seed, "n": n},
                f"{IMPORT}seed({seed})\n"
                f"inside = sum(random()**2 + random()**2 < 1 for _ in range({n}))\n"
                f"print(4 * inside / {n})", numbers=(4 * inside / n,))


@KINDS.add("simulations", weight=1.3)
def savings(rng: random.Random, language: str, state: dict) -> Task | None:
    n, p = whole(rng, 100, 5), rng.randint(2, 15)
    m = int(n * rng.uniform(1.2, 6))
    growth = Fraction(100 + p, 100)
    years = max(0, math.ceil(math.log(m / n) / math.log(growth)) - 1)
    while n * growth**years <= m:
        years += 1
    code = (f"money = {n}\nyears = 0\nwhile money <= {m}:\n    money *= 1 + {p} / 100\n"
            "    years += 1\nprint(years)")
    return Task({"n": n, "p": p, "m": m}, code, numbers=(years,))


@KINDS.add("simulations")
def collatz(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 3, 4)
    code = (f"n = {n}\nsteps = 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n"
            "    steps += 1\nprint(steps)")
    return Task({"n": n}, code, numbers=(collatz_steps(n),))


def collatz_steps(n: int) -> int:
    return 0 if n == 1 else 1 + collatz_steps(3 * n + 1 if n % 2 else n // 2)


@KINDS.add("simulations", weight=0.7)
def bounce(rng: random.Random, language: str, state: dict) -> Task:
    n, p, k = whole(rng, 2, 2), rng.randint(30, 90), rng.randint(2, 8)
    value = round(float(n * Fraction(p, 100) ** k), 4)
    code = (f"height = {n}\nfor _ in range({k}):\n    height *= {p} / 100\n"
            "print(round(height, 4))")
    return Task({"n": n, "p": p, "k": k}, code, numbers=(value,))


@KINDS.add("simulations", weight=0.7)
def doubling(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 2, 3)
    m = n * rng.randint(3, 5000)
    hours = (m // n).bit_length()
    code = (f"count = {n}\nhours = 0\nwhile count <= {m}:\n    count *= 2\n    hours += 1\n"
            "print(hours)")
    return Task({"n": n, "m": m}, code, numbers=(hours,))
