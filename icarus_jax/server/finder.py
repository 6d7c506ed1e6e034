"""Finds a string in a stream of characters. Host only: no jax."""

from __future__ import annotations


class Finder:
    """Finds one string in a stream of characters, with the algorithm of Knuth, Morris and Pratt.

    It finds every occurrence. Set `matched` to 0 after one to find none that overlaps it.

    Attributes:
        text: the string to find.
        matched: how many of its first characters the stream ends with so far.
    """

    def __init__(self, text: str):
        """Prepares the search.

        Args:
            text: the string to find; it must not be empty.
        """
        self.text = text
        self.matched = 0
        self._border = [0]  # of each prefix of `text`: the length of its longest proper suffix that is a prefix too
        for char in text[1:]:
            self._border.append(self._next(char, self._border[-1]))

    def afresh(self) -> Finder:
        """Returns a finder of the same string for another stream. It shares the table, which takes long to make."""
        finder = Finder.__new__(Finder)
        finder.text, finder.matched, finder._border = self.text, 0, self._border
        return finder

    def _next(self, char: str, matched: int) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def advance(self, char: str) -> bool:
        """Takes the next character of the stream in.

        Args:
            char: the character.

        Returns:
            True if it completes the string.
        """
        self.matched = self._next(char, self.matched)
        if self.matched < len(self.text):
            return False
        self.matched = self._border[-1]
        return True
