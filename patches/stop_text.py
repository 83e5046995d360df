"""Stop words in a text that arrives in pieces."""


class StopText:
    """Passes a text on up to the first of some stop words, wherever the pieces break.

    What may be the beginning of a stop word is held back until the next piece tells.

    Args:
        words: where the text ends.
        keep: whether the stop word itself is still part of the text.
    """

    def __init__(self, words: list[str], keep: bool = False):
        self.words = words
        self.keep = keep
        self.found = False
        self._held = ""

    def feed(self, piece: str, last: bool = False) -> str:
        """The part of the text that is certain now; with `last`, all that is left."""
        text, self._held = self._held + piece, ""
        hits = [(start, word) for word in self.words if (start := text.find(word)) >= 0]
        if hits:
            start, word = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self.found = True
            return text[:start + len(word)] if self.keep else text[:start]
        if last:
            return text
        held = max((self._overlap(text, word) for word in self.words), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """How many of the last characters of the text are the first ones of the word."""
        longest = min(len(text), len(word) - 1)
        return next((n for n in range(longest, 0, -1) if word.startswith(text[-n:])), 0)
