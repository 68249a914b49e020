# SPDX-License-Identifier: MIT
"""atheris: hwerr_notify.parse() on any bytes.

It takes them or raises RecordError. What it takes can be printed and is made of its bytes.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["hwerr_notify"]):
    import hwerr_notify
    from hwerr_notify.jsonform import to_json


def one(data: bytes) -> None:
    """A test case."""
    try:
        events = hwerr_notify.parse(data)
    except hwerr_notify.RecordError:
        return
    for e in events:
        json.dumps(to_json(e))
        str(e)
        repr(e)
        assert hwerr_notify.parse(e.raw) == [e]
    assert b"".join(e.raw for e in events) == data


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
