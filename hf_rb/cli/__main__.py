"""`python -m hf_rb.cli` is `hf-rb`."""

import sys

from hf_rb.cli import main


sys.exit(main())
