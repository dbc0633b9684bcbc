"""``python -m qvis`` is ``qvis``."""

import sys

from qvis.cli import main

if __name__ == "__main__":
    sys.exit(main())
