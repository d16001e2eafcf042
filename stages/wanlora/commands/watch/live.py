"""Refresh parts of a served page in place.

Owns: the policy and the script that pages of `wanlora watch` share.
"""

from wanlora.report.asset import asset
from wanlora.report.page import POLICY

SERVED_POLICY = f"{POLICY}; connect-src 'self'"
LIVE = asset("refresh.js")
