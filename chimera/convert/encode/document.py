"""A document: pieces of text and special tokens, and what of it is learned.

`bytes` are UTF-8 encoded as plain text, an `int` is a special token's id. Special tokens only ever enter as ids,
so text that merely looks like one stays text. (Bytes, since one character beyond U+FFFF makes Python keep a whole
`str` at 4 bytes a character.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from chimera.convert.encode.texts import Texts

Piece = bytes | int


@dataclass(slots=True)  # frozen it would take five times as long to make
class Document:
    """`assistant` has one flag a piece (conversations) or is empty (plain text): what the assistant says to be learned.

    `answers` are the numbers of pieces with which each of its turns ends, `shape` the fields that they are from.
    `counted` goes to the manifest, as (of what, name): the shape of the row, the fields passed over. `eos_learned`: the
    EOS behind it ends what is learned. `starts`: its mask says where it starts, as EOS may stand inside of it too.
    `more` are the other documents of the same row.
    """

    pieces: tuple[Piece, ...]
    assistant: tuple[bool, ...] = ()
    answers: tuple[int, ...] = field(default=(), compare=False)
    shape: str = field(default="", compare=False)
    counted: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    eos_learned: bool = False
    starts: bool = False
    more: "tuple[Document, ...]" = field(default=(), compare=False)

    @property
    def texts(self) -> Texts:
        """The pieces that are text, each of about `CHUNK` bytes at most; together they are the document's content."""
        if len(self.pieces) == 1 and isinstance(text := self.pieces[0], bytes):  # as most are
            return (text,)
        return tuple(piece for piece in self.pieces if isinstance(piece, bytes))

    def text_with(self, names: Mapping[int, str]) -> str:
        """The whole as one text, special tokens by their names."""
        return "".join(names[piece] if isinstance(piece, int) else piece.decode() for piece in self.pieces)

    @property
    def size(self) -> int:
        """Bytes of text, of the row's other documents too."""
        size = sum(map(len, self.texts))
        return size + sum(document.size for document in self.more) if self.more else size
