"""Text files a piece at a time: characters or words, and the vocabulary of the most frequent."""

import codecs
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from exo_toy import checks

UNKNOWN = "<unk>"
# Bytes read at a time; letters of a word, beyond which it goes on as another; words counted at a time.
CHUNK, LONGEST_WORD, MOST_WORDS = 2**20, 64, 2**20
_WORD = re.compile(rf"\w{{1,{LONGEST_WORD}}}|[^\w\s]")
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
Pieces = Iterable[str]


class TextError(Exception):
    """A file that is no use; the message says which and why."""


def pieces(
    file: BufferedIOBase, name: str, *, encoding: str | None = None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[str]:
    r"""The text of a file in pieces of about a million characters, from its beginning.

    A byte order mark is left out; line ends of any kind become a newline.

    Args:
        file: opened in binary, one that can be read again.
        name: of the file, for messages.
        encoding: of Python's codecs; "latin-1" reads any bytes, a character each. None for UTF-8, or what a byte order
            mark says of UTF-16 and UTF-32, without NUL characters, which are the mark of a binary file.
        on_bytes: gets the number of bytes read so far, after each piece.

    Yields:
        Strings, none empty.

    Raises:
        TextError: an unknown encoding, bytes that it has no character for, a binary file.

    Example:
        >>> list(pieces(io.BytesIO(b"one\r\ntwo"), "example"))
        ['one\ntwo']
    """
    file.seek(0)
    if encoding is None:
        start = file.read(4)
        file.seek(0)
        codec = next((codec for mark, codec in _BOMS if start.startswith(mark)), "utf-8")
    else:
        codec = encoding
    try:
        # It refuses those of Python's codecs that are from text to text or from bytes to bytes.
        io.TextIOWrapper(io.BytesIO(), encoding=codec)
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(codec)(), translate=True)
    except (LookupError, ValueError) as error:
        raise TextError(f"encoding must be one that Python knows, such as utf-8 or latin-1; got {codec!r}") from error
    n_bytes, begun, raw = 0, False, b"-"
    while raw:
        raw = file.read(CHUNK)
        n_bytes += len(raw)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeError as error:
            raise TextError(f"{name}: {_undecodable(error, codec, n_bytes)}") from error
        if not begun and text:
            text, begun = text.removeprefix("\ufeff"), True
        if encoding is None and "\0" in text:
            raise TextError(f"{name}: holds NUL characters: a binary file? --encoding latin-1 reads any bytes")
        if text:
            yield text
        if on_bytes is not None:
            on_bytes(n_bytes)


def characters(text: Pieces) -> Iterator[str]:
    """The pieces themselves: a string is a sequence of characters."""
    yield from text


def words(text: Pieces) -> Iterator[list[str]]:
    """Runs of letters, digits and underscores, and every other character that is no space by itself.

    A run of more than 64 goes on as another word. Where the pieces begin and end makes no difference.

    Example:
        >>> list(words(["Call me Ish", "mael."]))
        [['Call', 'me'], ['Ishmael'], ['.']]
    """
    rest = ""
    for piece in text:
        rest += piece
        found = [match.span() for match in _WORD.finditer(rest)]
        # A word at the end may go on.
        cut = found.pop()[0] if found and found[-1][1] == len(rest) else len(rest)
        if found:
            yield [rest[first:last] for first, last in found]
        rest = rest[cut:]
    if rest:
        yield _WORD.findall(rest)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that are told apart.

    Args:
        tokens: by number, the most frequent first; the last is ``<unk>`` where some are not told apart.
        joined_by: what stands between tokens in a text: nothing for characters, a space for words.
    """

    tokens: tuple[str, ...]
    joined_by: str

    @classmethod
    def of(cls, tokens: Iterable[Iterable[str]], *, size: int, joined_by: str) -> tuple["Vocabulary", int]:
        """The most frequent tokens of a text, of equals the first by code point, and how many different ones it has.

        Args:
            tokens: the text's tokens, in pieces.
            size: the most tokens, ``<unk>`` among them; at least 2.
            joined_by: what stands between tokens in a text.

        Returns:
            (the vocabulary, number of different tokens). Of a text of more than a million different words, the rare
            ones are forgotten on the way: the counts of those that are just frequent enough may then be low.

        Raises:
            ValueError: a size below 2.

        Example:
            >>> Vocabulary.of(["abracadabra"], size=3, joined_by="")
            (Vocabulary(tokens=('a', 'b', '<unk>'), joined_by=''), 5)
        """
        checks.require_integer("size", size, at_least=2)
        counts = Counter[str]()
        for piece in tokens:
            counts.update(piece)
            if len(counts) > MOST_WORDS:
                counts = Counter(dict(counts.most_common(MOST_WORDS // 2)))
        ordered = sorted(counts, key=lambda token: (-counts[token], token))
        kept = ordered if len(ordered) <= size else [*ordered[: size - 1], UNKNOWN]
        return cls(tuple(kept), joined_by), len(ordered)

    @property
    def has_unknown(self) -> bool:
        """Whether the last token stands for all others."""
        return bool(self.tokens) and self.tokens[-1] == UNKNOWN

    @cached_property
    def number(self) -> dict[str, int]:
        """The number of each token but ``<unk>``."""
        return {token: i for i, token in enumerate(self.tokens) if token != UNKNOWN}

    def numbers(self, tokens: Iterable[str]) -> Int64[Tensor, " N"]:
        """The tokens' numbers, that of ``<unk>`` for those that are not told apart.

        Example:
            >>> Vocabulary(("a", "b", "<unk>"), "").numbers("abc")
            tensor([0, 1, 2])
        """
        get, unknown = self.number.get, len(self.tokens) - 1
        return torch.from_numpy(np.fromiter((get(token, unknown) for token in tokens), dtype=np.int64))

    def text(self, numbers: Int64[Tensor, " T"]) -> str:
        """Tokens as a text.

        Example:
            >>> Vocabulary(("the", "whale"), " ").text(torch.tensor([0, 1]))
            'the whale'
        """
        return self.joined_by.join(self.tokens[i] for i in numbers.tolist())


def _undecodable(error: UnicodeError, codec: str, n_bytes: int) -> str:
    """What a decoder could not read, where, and what may help."""
    where = ""
    if isinstance(error, UnicodeDecodeError):
        at = n_bytes - len(error.object) + error.start
        where = f" (byte 0x{error.object[error.start]:02x} at offset {at})"
    return f"is no {codec} text{where}: name its --encoding; latin-1 reads any bytes, a character each"
