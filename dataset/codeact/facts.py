"""Whether a text says what it should: numbers in their order, words, a verdict.

One rule for what code prints and for what an agent answers.
"""
import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
TOLERANCE = 1e-6  # relative; a difference quotient has about eight right digits
ROUNDED_DIGITS = 5  # so many significant digits may stand for the number
NEGATIONS = ("不", "not ")  # before a verdict they turn it round


def numbers_in(text: str) -> list[str]:
    return NUMBER.findall(THOUSANDS.sub("", text))


def same_number(written: str, expected: int | float) -> bool:
    """Whether this is the number: whole ones exactly, others up to rounding."""
    if isinstance(expected, int) and re.fullmatch(r"-?\d+", written):
        return int(written) == expected
    difference = abs(float(written) - expected)
    if difference <= TOLERANCE * abs(expected):
        return True
    digits, _, exponent = written.lower().partition("e")
    decimals = len(digits.partition(".")[2])
    significant = len(digits.replace("-", "").replace(".", "").lstrip("0"))
    last_digit = 10.0 ** (int(exponent or 0) - decimals)
    return significant >= ROUNDED_DIGITS and decimals > 0 and difference <= 0.5001 * last_digit


def has_numbers(text: str, expected: Sequence[int | float]) -> bool:
    """Whether the numbers stand in the text one after the other."""
    found = numbers_in(text)
    return any(
        all(map(same_number, found[i : i + len(expected)], expected))
        for i in range(len(found) - len(expected) + 1)
    )


def says(
    text: str, numbers: Sequence[int | float], texts: Sequence[str], verdict: str = ""
) -> bool:
    """Whether the text has all of this; a verdict replaces the texts, and must not be negated."""
    if verdict:
        place = text.find(verdict)
        return place >= 0 and not text[:place].endswith(NEGATIONS)
    return (not numbers or has_numbers(text, numbers)) and all(part in text for part in texts)
