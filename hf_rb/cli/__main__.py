import sys

from hf_rb.cli import main


sys.exit(main())
