"""``python -m bench NAME``: what ``mta-fast bench NAME`` forwards to."""

from __future__ import annotations

import sys

from mta_fast.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
