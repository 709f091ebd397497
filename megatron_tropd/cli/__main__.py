"""``python -m megatron_tropd.cli`` is the ``tropd`` command."""

import sys

from megatron_tropd.cli.main import main

sys.exit(main())
