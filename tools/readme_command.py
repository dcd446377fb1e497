"""Prints a command that README.md shows, so that CI runs what the reader is told to run.

    python tools/readme_command.py test

README.md marks such a block by a comment above it: <!-- command:test -->
"""

import re
import sys
from pathlib import Path

name = sys.argv[1]
readme = Path(__file__).resolve().parent.parent / "README.md"
pattern = rf"<!-- command: *{re.escape(name)} -->\s*\n```\w*\n(.*?)^```"
block = re.search(pattern, readme.read_text(), re.DOTALL | re.MULTILINE)
if not block:
    sys.exit(f"README.md has no block marked <!-- command:{name} -->")
print(block[1], end="")
