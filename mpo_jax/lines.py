"""The text of a file of lines enters; its lines leave, split at line feeds alone.

`str.splitlines` also splits at U+2028, U+2029, U+0085 and others, which JSON may hold unescaped within a string: a
reply with one of them would break the record around it.
"""


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their line feeds; a line feed at the very end begins no further line."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines
