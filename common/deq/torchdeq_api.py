"""The old place of `common.torchdeq.api`: programs that say `from common.deq import torchdeq_api` keep working."""

import sys

from common.torchdeq import api

sys.modules[__name__] = api
