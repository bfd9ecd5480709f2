"""Long-form text from the command line: `python generate.py --prompt "..."`. All flags: `--help`."""

import sys

from tokenswift_py.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
