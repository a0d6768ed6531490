"""`python -m ringattn` is the console script `ringattn`."""

from ringattn.cli import main

raise SystemExit(main())
