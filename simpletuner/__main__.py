"""python -m simpletuner."""

import sys

from simpletuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
