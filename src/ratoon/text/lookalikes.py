"""Tables of what is mistaken for what: keys beside each other, letters that look alike, forms of half and full width.

Tables only; where they are applied is decided in `perturb.py`. The keyboard is the US layout. The look-alikes are those
of the Unicode Consortium's confusables (UTS #39) that most fonts draw as good as equal, from Cyrillic and Greek.
"""

from __future__ import annotations

_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""The three rows of letters, and how far each stands to the right of the first, in keys."""


def _neighbours() -> dict[str, tuple[str, ...]]:
    """For each letter the letters whose keys touch its own: in the same row, or in the next row less than one key off.
    Small letters to small ones, capitals to capitals."""
    keys = {
        letter: (row, column + shift)
        for row, (letters, shift) in enumerate(_ROWS)
        for column, letter in enumerate(letters)
    }
    table = {}
    for letter, (row, column) in keys.items():
        near = tuple(
            other
            for other, (its_row, its_column) in keys.items()
            if (its_row == row and abs(its_column - column) == 1.0)
            or (abs(its_row - row) == 1 and abs(its_column - column) < 1.0)
        )
        table[letter] = near
        table[letter.upper()] = tuple(other.upper() for other in near)
    return table


KEYBOARD: dict[str, tuple[str, ...]] = _neighbours()

HOMOGLYPHS: dict[str, tuple[str, ...]] = {
    "a": ("\u0430",),  # Cyrillic a
    "c": ("\u0441",),  # Cyrillic es
    "d": ("\u0501",),  # Cyrillic Komi de
    "e": ("\u0435",),  # Cyrillic ie
    "h": ("\u04bb",),  # Cyrillic shha
    "i": ("\u0456",),  # Cyrillic Byelorussian-Ukrainian i
    "j": ("\u0458", "\u03f3"),  # Cyrillic je, Greek yot
    "o": ("\u043e", "\u03bf"),  # Cyrillic o, Greek omicron
    "p": ("\u0440",),  # Cyrillic er
    "q": ("\u051b",),  # Cyrillic qa
    "s": ("\u0455",),  # Cyrillic dze
    "v": ("\u03bd",),  # Greek nu
    "w": ("\u051d",),  # Cyrillic we
    "x": ("\u0445",),  # Cyrillic ha
    "y": ("\u0443",),  # Cyrillic u
    "A": ("\u0410", "\u0391"),  # Cyrillic a, Greek alpha
    "B": ("\u0412", "\u0392"),  # Cyrillic ve, Greek beta
    "C": ("\u0421",),  # Cyrillic es
    "E": ("\u0415", "\u0395"),  # Cyrillic ie, Greek epsilon
    "H": ("\u041d", "\u0397"),  # Cyrillic en, Greek eta
    "I": ("\u0406", "\u0399"),  # Cyrillic i, Greek iota
    "J": ("\u0408",),  # Cyrillic je
    "K": ("\u041a", "\u039a"),  # Cyrillic ka, Greek kappa
    "M": ("\u041c", "\u039c"),  # Cyrillic em, Greek mu
    "N": ("\u039d",),  # Greek nu
    "O": ("\u041e", "\u039f"),  # Cyrillic o, Greek omicron
    "P": ("\u0420", "\u03a1"),  # Cyrillic er, Greek rho
    "S": ("\u0405",),  # Cyrillic dze
    "T": ("\u0422", "\u03a4"),  # Cyrillic te, Greek tau
    "X": ("\u0425", "\u03a7"),  # Cyrillic ha, Greek chi
    "Y": ("\u03a5",),  # Greek upsilon
    "Z": ("\u0396",),  # Greek zeta
}

WIDTHS: dict[str, tuple[str, ...]] = {
    **{chr(code): (chr(code + 0xFEE0),) for code in range(0x21, 0x7F)},
    **{chr(code + 0xFEE0): (chr(code),) for code in range(0x21, 0x7F)},
}
"""ASCII's printed characters and their full-width forms (U+FF01 … U+FF5E), both ways. The space stays as it is: what
separates words is the business of `spacing`."""
