"""The command line: `python -m masa`, or `torchrun -m masa` for several processes."""

import sys

from masa.run import main

if __name__ == "__main__":
    sys.exit(main())
