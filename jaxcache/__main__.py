"""`python -m jaxcache`."""

import sys

from jaxcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
