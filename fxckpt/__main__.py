"""`python -m fxckpt`."""

import sys

from fxckpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
