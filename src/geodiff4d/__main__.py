"""`python -m geodiff4d` is `geodiff4d`."""

import sys

from geodiff4d.cli import main

sys.exit(main())
