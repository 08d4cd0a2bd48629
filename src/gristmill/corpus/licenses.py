"""Licenses: what a package's metadata says, as an SPDX expression, and whether an expression is allowed.

Pure functions over strings. They recognise what is declared; they do not judge whether a declaration is right.
"""

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageMetadata

UNKNOWN = "unknown"
LICENSE_CLASS = "License ::"

# What people write in the free-text License field -> SPDX, after `_plain`.
ALIASES = {
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2 0": "Apache-2.0",
    "asl 2 0": "Apache-2.0",
    "apache software": "Apache-2.0",
    "mit": "MIT",
    "expat": "MIT",
    "bsd 2 clause": "BSD-2-Clause",
    "2 clause bsd": "BSD-2-Clause",
    "simplified bsd": "BSD-2-Clause",
    "bsd 3 clause": "BSD-3-Clause",
    "3 clause bsd": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "isc": "ISC",
    "isc iscl": "ISC",
    "psf": "PSF-2.0",
    "psf 2 0": "PSF-2.0",
    "python software foundation": "PSF-2.0",
    "unlicense": "Unlicense",
    "the unlicense unlicense": "Unlicense",
    "zlib": "Zlib",
    "zlib libpng": "Zlib",
    "mpl 2 0": "MPL-2.0",
    "mozilla public 2 0 mpl 2 0": "MPL-2.0",
    "historical permission notice and disclaimer hpnd": "HPND",
    "boost software 1 0 bsl 1 0": "BSL-1.0",
    "cc0 1 0 universal cc0 1 0 public domain dedication": "CC0-1.0",
}

# A phrase that stands in the text of one license only; the first match decides.
PHRASES = (
    (r"gnu (?:lesser |affero )?general public license", UNKNOWN),  # copyleft somewhere: let the classifiers say
    (r"apache license,?\s+version 2\.0", "Apache-2.0"),
    (r"permission is hereby granted, free of charge", "MIT"),
    (r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose", "ISC"),
    (r"redistribution and use in source and binary forms.*neither the name", "BSD-3-Clause"),
    (r"redistribution and use in source and binary forms", "BSD-2-Clause"),
)


# ---- expressions ---------------------------------------------------------------------------------------


def is_allowed(expression: str, allowed: Iterable[str]) -> bool:
    """Whether an SPDX expression can be met with licenses of the list; False for one that cannot be read.

    An exception (`GPL-2.0 WITH Classpath-exception-2.0`) only adds permissions: its license decides.
    """
    names = {name.casefold() for name in allowed}
    try:
        return _evaluate(expression, lambda name: name.casefold() in names)
    except (ValueError, RecursionError):  # RecursionError: a thousand parentheses
        return False


def is_expression(text: str) -> bool:
    """Whether the text has the form of an SPDX expression (its identifiers are not looked up)."""
    try:
        _evaluate(text, lambda name: True)
    except (ValueError, RecursionError):
        return False
    return True


def _evaluate(expression: str, holds: Callable[[str], bool]) -> bool:
    """Recursive descent over `or := and {OR and}`, `and := atom {AND atom}`, `atom := (or) | id [WITH id]`."""
    tokens = re.findall(r"[()]|[^\s()]+", expression)[::-1]

    def either() -> bool:
        value = both()
        while tokens and tokens[-1].upper() == "OR":
            tokens.pop()
            value = both() or value
        return value

    def both() -> bool:
        value = atom()
        while tokens and tokens[-1].upper() == "AND":
            tokens.pop()
            value = atom() and value
        return value

    def atom() -> bool:
        if tokens and tokens[-1] == "(":
            tokens.pop()
            value = either()
            if not tokens or tokens.pop() != ")":
                raise ValueError(expression)
            return value
        value = holds(identifier())
        if tokens and tokens[-1].upper() == "WITH":
            tokens.pop()
            identifier()
        return value

    def identifier() -> str:
        token = tokens.pop() if tokens else ""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.\-:]*\+?", token) or token.upper() in ("AND", "OR", "WITH"):
            raise ValueError(expression)
        return token

    value = either()
    if tokens:
        raise ValueError(expression)
    return value


# ---- package metadata ----------------------------------------------------------------------------------


def of_package(metadata: PackageMetadata, license_texts: Callable[[], Iterable[str]]) -> str:
    """A package's license from its core metadata, as SPDX, or "unknown".

    In the order of trust: License-Expression; the License field (an expression, a usual spelling, or a whole text);
    the classifiers. "BSD" alone does not say which: then the license files that the package ships decide.

    metadata: the core metadata's headers. license_texts: gives the texts of the license files, read only if needed.
    """
    expression = _header(metadata, "License-Expression")
    if expression:
        return expression
    declared = _resolve(_header(metadata, "License"), license_texts)
    if declared != UNKNOWN:
        return declared
    classifiers = [
        line.split("::")[-1].strip() for line in metadata.get_all("Classifier") or [] if LICENSE_CLASS in line
    ]
    found = {_resolve(name, license_texts) for name in classifiers if name not in ("OSI Approved", "DFSG approved")}
    # Several classifiers may mean either or all; all is the reading that cannot be wrong.
    return UNKNOWN if UNKNOWN in found or not found else " AND ".join(sorted(found))


def _header(metadata: PackageMetadata, name: str) -> str:
    return str((metadata.get_all(name) or [""])[0]).strip()


def _resolve(declared: str, license_texts: Callable[[], Iterable[str]]) -> str:
    if _plain(declared) != "bsd":
        return normalise(declared)
    for text in license_texts():
        if "redistribution and use in source and binary forms" in _flat(text):
            return "BSD-3-Clause" if "neither the name" in _flat(text) else "BSD-2-Clause"
    return UNKNOWN


def normalise(declared: str) -> str:
    """One declared license -> SPDX. "Apache 2.0 License" -> "Apache-2.0"; "MPL-2.0 AND MIT" stays."""
    if "\n" in declared or len(declared) > 200:
        return recognise(declared)
    plain = _plain(declared)
    if plain in ALIASES:
        return ALIASES[plain]
    # A lone word may be anything ("BSD", "LICENSE.txt"); SPDX names carry a version or stand in a known list.
    if is_expression(declared) and re.search(r"-\d|\b(?:MIT|ISC|Zlib)\b|LicenseRef-", declared):
        return declared
    return UNKNOWN


def recognise(text: str) -> str:
    """The license whose text this is, by a phrase of its own."""
    for pattern, name in PHRASES:
        if re.search(pattern, _flat(text)):
            return name
    return UNKNOWN


def _flat(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(declared: str) -> str:
    words = re.findall(r"[a-z0-9]+", declared.lower())
    return " ".join(word for word in words if word not in ("license", "licence", "version", "v", "the"))
