"""``Rows`` under the name that it had before ``mta_fast.layout``."""

from mta_fast.layout import Rows as Rows
