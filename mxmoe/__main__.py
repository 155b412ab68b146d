"""`python -m mxmoe`: the command line where the `mxmoe` script is not on the path."""

import sys

from mxmoe.cli import main

sys.exit(main())
