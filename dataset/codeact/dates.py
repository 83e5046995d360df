"""Dates; what the code must print is counted in days since the year 1."""
import random
from datetime import date, timedelta

from .kinds import KINDS, Task

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")
DAYS = {"zh": ("星期日", "星期一", "星期二", "星期三", "星期四", "星期五", "星期六"),
        "en": ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")}
IMPORT = "from datetime import *\n\n"
WEEKDAY = {"zh": 'print("星期" + "一二三四五六日"[d.weekday()])', "en": 'print(d.strftime("%A"))'}


def draw_date(rng: random.Random) -> date:
    first = date(rng.choice((1900, 1950, 1990, 2000, 2010, 2020)), 1, 1)
    return first + timedelta(days=rng.randrange(20000 if first.year < 2000 else 9000))


def written(day: date, language: str, rng: random.Random) -> str:
    if rng.random() < 0.25:
        return f"{day:%Y-%m-%d}" if language == "en" else f" {day:%Y-%m-%d} "
    if language == "zh":
        return rng.choice((f"{day.year}年{day.month}月{day.day}日",
                           f" {day.year} 年 {day.month} 月 {day.day} 日"))
    month = MONTHS[day.month - 1]
    return rng.choice((f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}"))


def python(day: date) -> str:
    return f"date({day.year}, {day.month}, {day.day})"


def name(day: date, language: str) -> str:
    """The weekday: day 1 of the proleptic Gregorian calendar was a Monday."""
    return DAYS[language][day.toordinal() % 7]


@KINDS.add("dates", weight=1.5)
def weekday(rng: random.Random, language: str, state: dict) -> Task:
    day = draw_date(rng)
    return Task({"date": written(day, language, rng)},
                f"{IMPORT}d = {python(day)}\n{WEEKDAY[language]}", texts=(name(day, language),),
                key=f"weekday {day}", state={"d": day})


@KINDS.add("dates", weight=1.5)
def days_between(rng: random.Random, language: str, state: dict) -> Task:
    day = draw_date(rng)
    days = rng.randint(2, 90) if rng.random() < 0.3 else rng.randint(91, 5000)
    other = date.fromordinal(day.toordinal() + days)
    return Task({"date": written(day, language, rng), "other": written(other, language, rng)},
                f"{IMPORT}print(({python(other)} - {python(day)}).days)", numbers=(days,))


def shifted(rng: random.Random, language: str, sign: str) -> Task:
    day, k = draw_date(rng), rng.randint(2, 1000)
    other = date.fromordinal(day.toordinal() + (k if sign == "+" else -k))
    return Task({"date": written(day, language, rng), "k": k},
                f"{IMPORT}d = {python(day)} {sign} timedelta(days={k})\nprint(d)",
                texts=(other.isoformat(),), state={"d": other})


@KINDS.add("dates", weight=1.5)
def date_plus(rng: random.Random, language: str, state: dict) -> Task:
    return shifted(rng, language, "+")


@KINDS.add("dates")
def date_minus(rng: random.Random, language: str, state: dict) -> Task:
    return shifted(rng, language, "-")


@KINDS.add("dates")
def day_of_year(rng: random.Random, language: str, state: dict) -> Task:
    day = draw_date(rng)
    number = day.toordinal() - date(day.year, 1, 1).toordinal() + 1
    return Task({"date": written(day, language, rng)},
                f"{IMPORT}d = {python(day)}\nprint(d.timetuple().tm_yday)", numbers=(number,),
                state={"d": day})


@KINDS.add("dates")
def leap_year(rng: random.Random, language: str, state: dict) -> Task:
    n = rng.choice((rng.randint(1600, 2500), rng.randint(400, 625) * 4, rng.randint(15, 26) * 100))
    yes = (date(n, 3, 1) - date(n, 2, 28)).days == 2
    verdict = {"zh": "是闰年" if yes else "不是闰年",
               "en": "is a leap year" if yes else "is not a leap year"}[language]
    return Task({"n": n, "verdict": verdict}, f"from calendar import *\n\nprint(isleap({n}))",
                texts=(str(yes),), verdict=verdict)


@KINDS.add("follow-up", needs="d")
def then_weekday(rng: random.Random, language: str, state: dict) -> Task:
    return Task({}, WEEKDAY[language], texts=(name(state["d"], language),), state=state)


@KINDS.add("follow-up", needs="d")
def then_days(rng: random.Random, language: str, state: dict) -> Task:
    k = rng.randint(2, 400)
    day = date.fromordinal(state["d"].toordinal() + k)
    return Task({"k": k}, f"d = d + timedelta(days={k})\nprint(d)", texts=(day.isoformat(),),
                state={"d": day})
