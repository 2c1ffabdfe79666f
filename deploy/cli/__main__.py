"""`python -m elastic_moe.deploy.cli` is the command `emoe`, for where scripts are not on the PATH."""

import sys

from elastic_moe.deploy.cli.entry import main

sys.exit(main())
