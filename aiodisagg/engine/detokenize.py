"""Text from tokens as they come: whole characters only, and nothing that may become part of a stop string.

A token of a byte-level vocabulary may end inside a UTF-8 character. Decoders then put one U+FFFD where the unfinished
character begins, so of a decoded text only a last U+FFFD can change when tokens follow; it is held back, everything
before it is final. Decoding all tokens anew each time would be quadratic: a window is decoded that begins at a place
where the text was whole, with a few tokens of context before it because some decoders treat a text's first token in
their own way. Where the text is whole nowhere, all but the last tokens are cut off: only three bytes can be unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
_WINDOW = 24
"""Tokens after which the decoded window is moved on."""
_LONGEST = 48
"""Tokens after which it is, though the text is not whole."""
_CONTEXT = 8
"""Tokens that are left of it then: three bytes and some."""


class IncrementalText:
    """Text of a growing list of tokens. ``decode`` gives the text of tokens, U+FFFD for unfinished characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned
        self._whole = 0  # tokens of the window after which the text was last whole

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        end = len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
        new = text[self._given : end]
        self._given = max(self._given, end)
        if end == len(text):
            if self._whole and len(self._window) > _WINDOW:
                del self._window[: self._whole]
                self._given = len(self._decode(self._window))
            self._whole = len(self._window)
        elif len(self._window) > _LONGEST:
            self._cut(len(text) - self._given)
        return new

    def _cut(self, held: int) -> None:
        """``held``: characters of the text that were not returned. A token without a text has no byte to count."""
        self._window = [token_id for token_id in self._window if self._decode([token_id])][-_CONTEXT:]
        self._given, self._whole = len(self._decode(self._window)) - held, 0

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never finished."""
        text = self._decode(self._window) if self._window else ""
        new, self._given = text[self._given :], max(self._given, len(text))
        return new


class StopStrings:
    """Cuts a text before the first stop string, wherever the pieces are split. Longest hold-back: a stop string - 1."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not returned yet. Nothing after a stop."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]  # who ends first, as if the text came by single characters
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


class AnswerText:
    """Both of the above for one request."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._text = IncrementalText(decode)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stops.stopped

    def feed(self, token_id: int) -> str:
        return self._stops.feed(self._text.feed(token_id))

    def finish(self) -> str:
        """The rest; may meet a stop string itself."""
        last = self._stops.feed(self._text.finish())
        return last + self._stops.finish()
