"""
How a person looks: initials on a colour, the same on every page and machine.
"""

import zlib

HUES = 10


def avatar(name):
    """Return the name with its initials and the number of its colour."""
    letters = [next(filter(str.isalnum, word), "") for word in name.split()]
    initials = letters[0] + letters[-1] if len(letters) > 1 else "".join(letters)
    return {
        "name": name,
        "initials": initials.upper(),
        "hue": zlib.crc32(name.casefold().encode()) % HUES,
    }
