"""
How a person looks: initials on a colour, the same on every page and machine.
"""

import zlib

HUES = 10


def avatar(name):
    """Return the name with its initials and the number of its colour."""
    words = name.split()
    initials = "".join(word[0] for word in (words[:1] + words[1:][-1:]))
    return {
        "name": name,
        "initials": initials.upper(),
        "hue": zlib.crc32(name.casefold().encode()) % HUES,
    }
