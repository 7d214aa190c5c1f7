"""`python -m clockwork_hooks` is the `clockwork-hooks` command."""

import sys

from clockwork_hooks.cli import main

if __name__ == "__main__":
    sys.exit(main())
