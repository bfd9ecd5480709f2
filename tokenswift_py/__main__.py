"""`python -m tokenswift_py` is the command `tokenswift`, wherever scripts are not on the PATH."""

import sys

from tokenswift_py.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
