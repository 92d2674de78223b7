"""``python -m data_prep.sample_text``."""

import sys

from data_prep.sample_text.fetch import main

sys.exit(main())
