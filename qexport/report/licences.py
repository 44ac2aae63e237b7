"""The Hub's identifier of a licence, from the text of a LICENSE file.

Identifiers: https://huggingface.co/docs/hub/repositories-licenses. A text that is not known for sure gets
none: a wrong licence on a card is worse than no licence.
"""

from __future__ import annotations

import re
from pathlib import Path

from qexport.checkpoint.disk import is_file

_HEAD_BYTES = 4096  # the title and the first sentences
_FILES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md", "LICENCE.txt", "LICENCE.md", "COPYING")
# What the beginning of the text says, white space as single blanks, case ignored; the first that fits.
_BEGINNINGS = (
    (r"apache license,? version 2\.0", "apache-2.0"),
    (r"llama 4 community license", "llama4"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
    (r"gemma terms of use", "gemma"),
    (r"bigscience rail license v1\.0|bigscience bloom rail", "bigscience-bloom-rail-1.0"),
    (r"gnu affero general public license,? version 3", "agpl-3.0"),
    (r"gnu lesser general public license,? version 3", "lgpl-3.0"),
    (r"gnu general public license,? version 3", "gpl-3.0"),
    (r"gnu general public license,? version 2", "gpl-2.0"),
    (r"mozilla public license,? version 2\.0", "mpl-2.0"),
    (r"creative commons attribution-noncommercial-sharealike 4\.0", "cc-by-nc-sa-4.0"),
    (r"creative commons attribution-noncommercial-noderivatives 4\.0", "cc-by-nc-nd-4.0"),
    (r"creative commons attribution-noncommercial 4\.0", "cc-by-nc-4.0"),
    (r"creative commons attribution-sharealike 4\.0", "cc-by-sa-4.0"),
    (r"creative commons attribution 4\.0", "cc-by-4.0"),
    (r"creative commons (legal code )?cc0 1\.0", "cc0-1.0"),
    (r"this is free and unencumbered software released into the public domain", "unlicense"),
    (r"mit license|permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"redistribution and use in source and binary forms.*neither the name", "bsd-3-clause"),
    (r"redistribution and use in source and binary forms", "bsd-2-clause"),
)
_IDENTIFIERS = {identifier for _, identifier in _BEGINNINGS}


def licence_file(directory: Path) -> str | None:
    """The name of the licence's text in a directory."""
    return next((name for name in _FILES if is_file(directory / name)), None)


def licence_of(directory: Path) -> str | None:
    """The Hub's identifier of the licence that lies in a directory; None where there is none, or no known."""
    name = licence_file(directory)
    if name is None:
        return None
    try:
        with (directory / name).open("rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    plain = " ".join(re.sub(r"[^\w.,:\-()/ ]", " ", re.sub(r"\s", " ", head)).lower().split())
    if plain.removesuffix(" license") in _IDENTIFIERS:  # an SPDX identifier alone
        return plain.removesuffix(" license")
    return next((identifier for words, identifier in _BEGINNINGS if re.search(words, plain)), None)
