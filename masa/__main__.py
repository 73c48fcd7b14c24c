"""python -m masa, or torchrun -m masa."""

import sys

from masa.run import main

sys.exit(main())
